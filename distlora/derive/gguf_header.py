"""Read the header of a GGUF file: its metadata, and where each tensor lies. Reads no weight.

The gguf package's reader makes a numpy array of every token, which takes seconds, and tells of damage by whatever numpy
raises; its table of types is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from distlora.config import UserError, require
from distlora.config.errors import short

_AGAIN = "download it again"
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's format of each type of a number."""
_STRING, _ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]
    """As in torch: the last dimension is a row."""
    type: str
    """ggml's name of the type: Q4_K."""
    offset: int
    """Position of the first byte in the file."""
    num_bytes: int
    block: int
    """Weights of a block, which is decoded as a whole."""
    block_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows; of a vector, its elements."""
        return math.prod(self.shape) // self.width

    @property
    def width(self) -> int:
        """Weights of a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1


class GgufHeader(NamedTuple):
    """The header of a GGUF file."""

    metadata: dict[str, Any]
    """Values by key; of an array of strings its length."""
    tensors: dict[str, StoredTensor]
    size: int
    """Bytes of the header: where the data begins."""


def read_gguf_header(file: Path) -> GgufHeader:
    """Return the header. Raises UserError, with the tensor's name, for a damaged or truncated file."""
    require(file.stat().st_size >= 24, f"{file} is truncated: it has no header; {_AGAIN}")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parser = _Parser(file, data)
        try:
            return parser.header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise parser.damage(f"{parser.reading} ends beyond the file or is not text ({error})") from error


class _Parser:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.place, self.reading = file, data, 0, "its header"

    def damage(self, what: str) -> UserError:
        return UserError(f"{self.file} is damaged: {what}; {_AGAIN}")

    def unpack(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{format}", self.data, self.place)
        self.place += struct.calcsize(f"<{format}")
        return values

    def string(self) -> bytes:
        (length,) = self.unpack("Q")
        if length > len(self.data) - self.place:
            raise self.damage(f"{self.reading} has a text of {length:,} bytes")
        self.place += length
        return self.data[self.place - length : self.place]

    def value(self) -> Any:
        (kind,), inner, count = self.unpack("I"), None, 0
        if kind == _ARRAY:
            inner, count = self.unpack("IQ")
        if inner == _STRING:
            return len([self.string() for _ in range(count)])
        if kind == _STRING:
            return self.string().decode()
        if (format := _FORMATS.get(kind if inner is None else inner)) is None or count > len(self.data):
            raise self.damage(f"{self.reading} is of the unknown type {kind}, {inner}")
        values = self.unpack(format if inner is None else f"{count}{format}")
        return values[0] if inner is None else list(values)

    def header(self) -> GgufHeader:
        magic, version, tensors, keys = self.unpack("4sIQQ")
        require(magic == b"GGUF", f"{self.file} is not a GGUF file; set {{model.path}} to one")
        require(version in (2, 3), f"{self.file} is GGUF version {version}; convert it again to version 3")
        metadata = dict[str, Any]()
        for number in range(keys):
            self.reading = f"key {number + 1}"
            self.reading = self.string().decode()
            if self.reading in metadata:
                raise self.damage(f"it has {short(self.reading)} twice")
            metadata[self.reading] = self.value()
        entries = dict[str, tuple[tuple[int, ...], int, int]]()
        for _ in range(tensors):
            self.reading = f"the tensor behind {self.reading}"
            name = self.reading = self.string().decode()
            (dimensions,) = self.unpack("I")
            if not 1 <= dimensions <= 4 or name in entries:
                raise self.damage(f"{short(name)} is there twice or has {dimensions} dimensions")
            entries[name] = (self.unpack(f"{dimensions}Q")[::-1], *self.unpack("IQ"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self.damage(f"general.alignment={alignment}")
        end = start = -(-self.place // alignment) * alignment
        found, last = dict[str, StoredTensor](), "the header"
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2]):
            found[name] = tensor = self.tensor(name, *entry, start)
            if tensor.offset != end:
                raise self.damage(f"{name} begins at byte {tensor.offset:,}, not behind {last} at {end:,}")
            if (stop := tensor.offset + tensor.num_bytes) > (size := len(self.data)):
                raise UserError(f"{self.file} is truncated: {name} ends at byte {stop:,} of {size:,}; {_AGAIN}")
            end, last = -(-(stop - start) // alignment) * alignment + start, name
        return GgufHeader(metadata, {name: found[name] for name in entries}, start)

    def tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int) -> StoredTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if number not in set(GGMLQuantizationType):
            raise self.damage(f"{name} has the unknown type {number}")
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        require(
            block > 1 or kind.name in ("F32", "F16", "BF16"),
            f"{self.file}: {name} is stored as {kind.name}; set {{model.path}} to a file of another type",
        )
        if not all(shape) or shape[-1] % block:
            raise self.damage(f"{name} has rows of {shape[-1]:,} weights, and {kind.name} blocks of {block}")
        return StoredTensor(
            shape, kind.name, start + offset, math.prod(shape) // block * block_bytes, block, block_bytes
        )
