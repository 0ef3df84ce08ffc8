"""safetensors headers: read them as byte ranges of tensors, and build those of new files. Needs no torch.

A parameter is a list of segments, concatenated in flat order. Nothing here reads a tensor's data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from distlora.config import UserError
from distlora.config.errors import short
from distlora.config.json_files import check_shape, read_object

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPE_BYTES |= {"F8_E4M3": 1, "F8_E8M0": 1}
SOURCE_DTYPES = ("F32", "F16", "BF16")
"""Dtypes in which a weight of the base may be stored."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

LONGEST_HEADER = 100_000_000
"""Limit of safetensors itself, in bytes; a longer header is damage."""
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Segment:
    """The bytes of one tensor in one file."""

    file: Path
    offset: int
    """Position of the first byte in the file."""
    num_bytes: int
    dtype: str
    """Name in safetensors: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def content(self) -> bytes:
        """Read the whole tensor."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.num_bytes)


def overlaps(
    segments: Iterable[Segment], start: int, stop: int, size: Callable[[Segment], int] = lambda segment: segment.numel
) -> Iterator[tuple[Segment, int, int]]:
    """Yield (segment, low, high), the parts of concatenated segments that make up [start, stop).

    `size` counts what a segment has: elements, or others.
    """
    for segment in segments:
        count = size(segment)
        if max(start, 0) < min(stop, count):
            yield segment, max(start, 0), min(stop, count)
        start, stop = start - count, stop - count


def lay_out(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, dict[str, Any]]:
    """Return the header's entry of each tensor, in file order. `tensors`: (safetensors dtype, shape) by name.

    Larger elements come first, as safetensors orders them, so that each tensor is aligned.
    """
    table, end = dict[str, dict[str, Any]](), 0
    for name in sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return table


def header_bytes(table: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a file: the header's length, and the header padded to a multiple of 8 bytes."""
    text = json.dumps({_METADATA: metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_headers(folder: Path) -> dict[str, Segment]:
    """Return every tensor of a checkpoint folder (one safetensors file, or several with an index) by its name on disk.

    Raises UserError that names the file for a folder without safetensors, a missing, truncated or damaged file, and a
    tensor that the index lists and no file holds.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / SINGLE_NAME).is_file():
            raise UserError(
                f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; "
                "point {model.path} at a folder with safetensors weights (save_pretrained writes them)"
            )
        return read_header(folder / SINGLE_NAME)
    weight_map = read_index(index, "download the checkpoint again")
    shards = sorted(set(weight_map.values()))
    tensors: dict[str, Segment] = {}
    for number, shard in enumerate(shards, start=1):
        if not (folder / shard).is_file():
            raise UserError(
                f"{folder / shard} is missing: shard {number} of {len(shards)} in {INDEX_NAME}; download it again"
            )
        tensors |= read_header(folder / shard)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise UserError(
            f"{folder}: {INDEX_NAME} names {absent[0]} ({len(absent)} in all), which no shard holds; download it again"
        )
    return tensors


def read_index(index: Path, remedy: str) -> dict[str, str]:
    """Return the file name of each tensor.

    Raises UserError, ending with `remedy`, for a damaged index and for one that names files outside of its folder.
    """
    values = read_object(index, remedy)
    check_shape(values, {"weight_map": {"*": str}}, index, remedy)
    weight_map: dict[str, str] = values["weight_map"]
    for name, shard in weight_map.items():
        path = PurePosixPath(shard)
        is_name = 0 < max(map(len, path.parts), default=0) <= 255 and "\0" not in shard  # 255: of Linux's file systems.
        if path.is_absolute() or ".." in path.parts or not is_name:
            raise UserError(f"{index}: {name} is in {shard[:255]!r}, which is not a file in its folder; {remedy}")
    return weight_map


def read_header(file: Path, *, remedy: str = "download it again") -> dict[str, Segment]:
    """Return the tensors of one safetensors file (8-byte length, JSON header, data).

    The tensors must lie one after another from the first byte of the data to the last, as safetensors demands. Raises
    UserError, ending with `remedy`, for a damaged file.
    """
    return read_header_and_metadata(file, remedy=remedy)[0]


def read_header_and_metadata(
    file: Path, *, remedy: str = "download it again"
) -> tuple[dict[str, Segment], dict[str, str]]:
    """Return (`read_header`, the header's metadata)."""
    header, data = _raw_header(file, remedy)
    segments = {name: _segment(file, data, name, entry, remedy) for name, entry in header.items() if name != _METADATA}
    size, end, last = file.stat().st_size, data, ""
    for name, segment in sorted(segments.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if segment.offset + segment.num_bytes > size:
            raise UserError(
                f"{file} is truncated: {name} ends at byte {segment.offset + segment.num_bytes:,} of {size:,}; {remedy}"
            )
        if segment.offset != end:
            what = f"behind {last}" if last else "at the start of the data"
            raise UserError(
                f"{file} is damaged: {name} begins at byte {segment.offset:,}, not {what} at {end:,}; {remedy}"
            )
        end, last = segment.offset + segment.num_bytes, name
    if end != size:
        raise UserError(f"{file} is damaged: its tensors end at byte {end:,} of {size:,}; {remedy}")
    return segments, header.get(_METADATA, {})


def _raw_header(file: Path, remedy: str) -> tuple[dict[str, Any], int]:
    """Return (header, position of the data's first byte). Raises UserError for an invalid header."""
    if not file.is_file():  # Reading a pipe would wait for a writer.
        raise UserError(f"{file} is missing or not a file; {remedy}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size:
            raise UserError(
                f"{file} is truncated or damaged: its header does not fit into its {size:,} bytes; {remedy}"
            )
        if length > LONGEST_HEADER:
            raise UserError(f"{file} is damaged: a header of {length:,} bytes is beyond safetensors' limit; {remedy}")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a safetensors file: its header is damaged ({error}); {remedy}") from error
    if isinstance(header, dict) and header.get(_METADATA) is None:
        header.pop(_METADATA, None)
    check_shape(header, {f"{_METADATA}?": {"*": str}, "*": dict}, f"{file}'s header", remedy)
    return header, 8 + length


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raise ValueError for a repeated name, which would hide a tensor."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is repeated")
    return values


def _segment(file: Path, data: int, name: str, entry: Mapping[str, Any], remedy: str) -> Segment:
    """Parse one tensor's entry in the header. Raises UserError for an invalid one."""
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise UserError(f"{file} is damaged: its header has {short(dict(entry))} for {name}; {remedy}")
    first, end = offsets
    segment = Segment(file=file, offset=data + first, num_bytes=end - first, dtype=dtype, shape=shape)
    is_known = dtype in DTYPE_BYTES
    if end < first or (is_known and segment.num_bytes != segment.numel * DTYPE_BYTES[dtype]):
        raise UserError(
            f"{file} is damaged: {name} has {segment.num_bytes:,} bytes for shape {short(list(shape))} of {dtype}; "
            f"{remedy}"
        )
    return segment


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Return a list of 64-bit sizes as a tuple; None for anything else."""
    is_list = isinstance(value, list) and all(type(size) is int and 0 <= size < 2**64 for size in value)
    return tuple(value) if is_list else None


def check_stored_shape(name: str, on_disk: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than config.json describes."""
    if on_disk != shape:
        raise UserError(
            f"{name} has shape {list(on_disk)} on disk and {list(shape)} by config.json; "
            "they belong to different models: download the folder again"
        )
