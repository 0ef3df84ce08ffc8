"""Read the header of a GGUF file: its metadata, and where each tensor lies. Reads no weight.

The gguf package's reader makes a numpy array of every token, which takes seconds, and tells of damage by whatever numpy
raises; its table of types is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError, require
from distlora.config.errors import short

_AGAIN = "download it again"
_FORMATS = dict(zip(range(13), "BbHhIif?  Qqd", strict=True))
"""struct's format of each type of a value; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_DENSE = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element of the types without blocks that a weight may have."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
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


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a GGUF file."""

    metadata: dict[str, Any]
    """Values by key. An array of strings is its length."""
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
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError) as error:
            raise parser.damage(f"{parser.reading} ends beyond the file or is not text ({error})") from error


class _Parser:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.place = file, data, 0
        self.reading = "its header"

    def damage(self, what: str) -> UserError:
        return UserError(f"{self.file} is damaged: {what}; {_AGAIN}")

    def unpack(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{format}", self.data, self.place)
        self.place += struct.calcsize(f"<{format}")
        return values

    def string(self, *, skip: bool = False) -> str:
        (length,) = self.unpack("Q")
        if length > len(self.data) - self.place:
            raise self.damage(f"{self.reading} has a text of {length:,} bytes")
        self.place += length
        return "" if skip else self.data[self.place - length : self.place].decode()

    def value(self) -> Any:
        (kind,) = self.unpack("I")
        if kind == _STRING:
            return self.string()
        if kind in _FORMATS and kind != _ARRAY:
            return self.unpack(_FORMATS[kind])[0]
        inner, count = self.unpack("IQ") if kind == _ARRAY else (_ARRAY, 0)
        if inner == _STRING:
            for _ in range(count):
                self.string(skip=True)
            return count
        if inner not in _FORMATS or inner == _ARRAY or count > len(self.data):
            raise self.damage(f"{self.reading} is of the unknown type {kind if inner == _ARRAY else inner}")
        return list(self.unpack(f"{count}{_FORMATS[inner]}"))

    def header(self) -> GgufHeader:
        magic, version, tensors, keys = self.unpack("4sIQQ")
        require(magic == b"GGUF", f"{self.file} is not a GGUF file; set {{model.path}} to one")
        require(version in (2, 3), f"{self.file} is GGUF version {version}; convert it again to version 3")
        metadata = dict[str, Any]()
        for number in range(keys):
            self.reading = f"the key number {number + 1}"
            self.reading = self.string()
            if self.reading in metadata:
                raise self.damage(f"it has {short(self.reading)} twice")
            metadata[self.reading] = self.value()
        entries, name = dict[str, tuple[tuple[int, ...], int, int]](), "its last key"
        for _ in range(tensors):
            self.reading = f"the tensor behind {name}"
            name = self.reading = self.string()
            (dimensions,) = self.unpack("I")
            if not 1 <= dimensions <= 4 or name in entries:
                raise self.damage(f"{short(name)} is there twice or has {dimensions} dimensions")
            sizes = self.unpack(f"{dimensions}Q")
            entries[name] = (sizes[::-1], *self.unpack("IQ"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self.damage(f"general.alignment={alignment}")
        start = -(-self.place // alignment) * alignment
        found, end, last = dict[str, StoredTensor](), start, "the header"
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2]):
            found[name] = tensor = self.tensor(name, *entry, start)
            if tensor.offset != end:
                raise self.damage(f"{name} begins at byte {tensor.offset:,}, not behind {last} at {end:,}")
            if tensor.offset + tensor.num_bytes > len(self.data):
                raise UserError(
                    f"{self.file} is truncated: {name} ends at byte {tensor.offset + tensor.num_bytes:,} of "
                    f"{len(self.data):,}; {_AGAIN}"
                )
            end, last = tensor.offset + -(-tensor.num_bytes // alignment) * alignment, name
        return GgufHeader(metadata, {name: found[name] for name in entries}, start)

    def tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int) -> StoredTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if number not in set(GGMLQuantizationType):
            raise self.damage(f"{name} has the unknown type {number}")
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        require(
            block > 1 or kind.name in _DENSE,
            f"{self.file}: {name} is stored as {kind.name}; set {{model.path}} to a file of another type",
        )
        if not all(shape) or shape[-1] % block:
            raise self.damage(f"{name} has rows of {shape[-1]:,} weights, and {kind.name} blocks of {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        return StoredTensor(shape, kind.name, start + offset, num_bytes, block, block_bytes)
