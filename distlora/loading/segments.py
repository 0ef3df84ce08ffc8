"""Where a parameter lies on disk: safetensors headers to byte ranges. Needs no torch, so the launcher reads them too.

A parameter is a list of segments, concatenated along its first dimension in flat order. For the families of today that
list has one entry; merged experts and renamed weights have more. Nothing here opens a tensor's data.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from distlora.config import UserError

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SOURCE_DTYPES = ("F32", "F16", "BF16")
"""What a weight of the base may be stored in."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


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
                "point model.path at a folder with safetensors weights (save_pretrained writes them)"
            )
        return read_header(folder / SINGLE_NAME)
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no safetensors index ({error!r}); download the checkpoint again") from error
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


def read_header(file: Path, *, remedy: str = "download it again") -> dict[str, Segment]:
    """The tensors of one safetensors file, checked against the file's length (8-byte length, JSON header, data).

    Raises UserError for a damaged file, which says `remedy`.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size:
            raise UserError(
                f"{file} is truncated or damaged: its header does not fit into its {size:,} bytes; {remedy}"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            data = 8 + length
            segments = {
                name: Segment(
                    file=file,
                    offset=data + entry["data_offsets"][0],
                    num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no safetensors file: its header is damaged ({error!r}); {remedy}") from error
    for name, segment in segments.items():
        if segment.offset + segment.num_bytes > size:
            raise UserError(
                f"{file} is truncated: {name} ends at byte {segment.offset + segment.num_bytes:,} of {size:,}; {remedy}"
            )
        if segment.num_bytes != segment.numel * DTYPE_BYTES.get(segment.dtype, 0) and segment.dtype in DTYPE_BYTES:
            raise UserError(
                f"{file} is damaged: {name} has {segment.num_bytes:,} bytes for shape {list(segment.shape)}; {remedy}"
            )
    return segments


def read_metadata(file: Path) -> dict[str, str]:
    """What the header of a safetensors file, which `read_header` has checked, says beside its tensors."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        metadata: dict[str, str] = json.loads(stream.read(length)).get("__metadata__", {})
    return metadata


def fingerprint(folder: Path) -> str:
    """SHA-256 of every tensor's name, dtype, shape and 4 KiB from its middle: tells one base from another in a second.

    Two checkpoints that differ only outside those bytes look alike; training changes bytes everywhere.
    """
    digest = hashlib.sha256()
    for name, segment in sorted(read_headers(folder).items()):
        digest.update(f"{name} {segment.dtype} {segment.shape}\n".encode())
        with segment.file.open("rb") as stream:
            stream.seek(segment.offset + max(segment.num_bytes // 2 - 2048, 0))
            digest.update(stream.read(min(4096, segment.num_bytes)))
    return digest.hexdigest()
