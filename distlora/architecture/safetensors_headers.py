"""Where a parameter lies on disk: safetensors headers to byte ranges, and the headers of what is written. Needs no
torch, so the launcher reads them too, and the planner knows how long a file will be.

A parameter is a list of segments, concatenated along its first dimension in flat order. For the families of today that
list has one entry; merged experts and renamed weights have more. Nothing here opens a tensor's data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from distlora.config import UserError
from distlora.config.errors import short
from distlora.config.json_files import check_shape, read_object

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SOURCE_DTYPES = ("F32", "F16", "BF16")
"""What a weight of the base may be stored in."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit: a longer one is damage."""
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Segment:
    """One tensor's bytes in one file."""

    file: Path
    offset: int
    """First byte, from the file's start."""
    num_bytes: int
    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def lay_out(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, dict[str, Any]]:
    """A header's entry of each tensor, by name (dtype as safetensors has it, shape), in the order in which they lie in
    the file: larger elements first, as safetensors itself orders them, so that each starts at a multiple of its size.
    """
    table, end = dict[str, dict[str, Any]](), 0
    for name in sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return table


def header_bytes(table: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file: a header's length, and it, with spaces up to a multiple of 8 bytes."""
    text = json.dumps({_METADATA: metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_headers(folder: Path) -> dict[str, Segment]:
    """Every tensor of a checkpoint folder (one safetensors file, or several with an index) by its name on disk.

    Raises UserError that names the file for a folder without safetensors, a missing, truncated or damaged shard, and a
    tensor that the index promises and no shard holds.
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
    """Which shard holds each tensor. Raises UserError, which says `remedy`, for an index that is damaged, and for one
    that names files outside of its folder.
    """
    values = read_object(index, remedy)
    check_shape(values, {"weight_map": {"*": str}}, index, remedy)
    weight_map: dict[str, str] = values["weight_map"]
    for name, shard in weight_map.items():
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in shard:
            raise UserError(f"{index}: {name} is in {shard!r}, which is no file of its folder; {remedy}")
    return weight_map


def read_header(file: Path, *, remedy: str = "download it again") -> dict[str, Segment]:
    """The tensors of one safetensors file (8-byte length, JSON header, data), which must lie one after the other from
    the data's first byte to the file's last, as safetensors itself demands.

    Raises UserError for a damaged file, which says `remedy`.
    """
    return read_header_and_metadata(file, remedy=remedy)[0]


def read_header_and_metadata(
    file: Path, *, remedy: str = "download it again"
) -> tuple[dict[str, Segment], dict[str, str]]:
    """`read_header`, and what the header says beside its tensors."""
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
    """(header, first byte of the data). Raises UserError for what is no header."""
    if not file.is_file():  # Reading a pipe would wait for a writer.
        raise UserError(f"{file} is missing, or no file; {remedy}")
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
        raise UserError(f"{file} is no safetensors file: its header is damaged ({error}); {remedy}") from error
    if isinstance(header, dict) and header.get(_METADATA) is None:
        header.pop(_METADATA, None)
    check_shape(header, {f"{_METADATA}?": {"*": str}, "*": dict}, f"{file}'s header", remedy)
    return header, 8 + length


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header, where one name for two tensors would hide one of them."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is there twice")
    return values


def _segment(file: Path, data: int, name: str, entry: Mapping[str, Any], remedy: str) -> Segment:
    """Where one tensor lies, by its entry in the header. Raises UserError for an entry that says no place."""
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise UserError(f"{file} is damaged: its header says {short(dict(entry))} of {name}; {remedy}")
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
    """A header's list of sizes, such as 64 bits hold; None for anything else."""
    is_list = isinstance(value, list) and all(type(size) is int and 0 <= size < 2**64 for size in value)
    return tuple(value) if is_list else None
