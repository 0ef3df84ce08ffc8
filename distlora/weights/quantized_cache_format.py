"""File format of the quantized-weights cache: the names and headers of its files (pieces). Needs no torch.

A piece's name states which shard of the groups it holds, so a reader opens no other piece. Its header states which
groups of which weights it holds. Each weight has `codes`, `scales`, `group_scale` and `checksums` (one number per
group).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.safetensors_headers import Segment, header_bytes, read_header_and_metadata
from distlora.config import UserError
from distlora.config.json_files import check_shape

FORMAT = 2
"""Version of the format; it is part of the cache key."""
PARTS: Mapping[str, tuple[str, tuple[int, ...], int]] = {
    "codes": ("U8", (8192,), 8192),
    "scales": ("U8", (256,), 256),
    "group_scale": ("F32", (), 4),
    "checksums": ("I64", (), 8),
}
"""Parts of a group in a piece, in this order: safetensors dtype, shape and bytes."""
GROUP_BYTES = sum(num_bytes for *_, num_bytes in PARTS.values())

PIECE_NAME = re.compile(r"([0-9]{5,})-([0-9]+)of([0-9]+)-[0-9a-f]{16}\.safetensors")
_METADATA = "distlora_piece"
_DIGEST = "digest"


class DamagedPieceError(Exception):
    """A piece is not what was written; the message says how."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Groups [first, stop) of one weight."""

    first: int
    stop: int
    offset: float
    """The weight's offset of double quantization, which all groups share."""
    parts: Mapping[str, Segment]
    """Position of each of PARTS in the piece; empty before the piece is written."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece and the groups in it."""

    path: Path
    extents: Mapping[str, Extent]
    """By the weight's Hugging Face name."""


@dataclass(frozen=True, slots=True)
class PieceName:
    """The facts in a piece's name."""

    path: Path
    block: int
    index: int
    count: int

    @classmethod
    def of(cls, path: Path) -> PieceName | None:
        """Parse a path; None if it is not a piece's name."""
        match = PIECE_NAME.fullmatch(path.name)
        name = cls(path, *map(int, match.groups())) if match else None
        return name if name is not None and name.index < name.count else None

    def may_hold(self, num_groups: int, groups: range) -> bool:
        """Return whether the piece may hold some of these groups of a weight of `num_groups`."""
        owned = cut(num_groups, self.index, self.count)
        return owned.start < groups.stop and groups.start < owned.stop


def cut(num_groups: int, index: int, count: int) -> range:
    """Return the groups of a weight that rank `index` of `count` ranks owns."""
    each = -(-num_groups // count)
    return range(min(index * each, num_groups), min((index + 1) * each, num_groups))


def holes(groups: range, held: Sequence[tuple[int, int]]) -> list[range]:
    """Return the parts of `groups` that none of `held` (first, stop) covers."""
    gaps, at = [], groups.start
    for first, stop in sorted(held):
        if first > at:
            gaps.append(range(at, min(first, groups.stop)))
        at = max(at, stop)
        if at >= groups.stop:
            break
    if at < groups.stop:
        gaps.append(range(at, groups.stop))
    return [hole for hole in gaps if hole]


def header_of(key: str, extents: Mapping[str, Extent]) -> bytes:
    """Return the first bytes of a piece: the safetensors header of its weights, in their order."""
    table: dict[str, Any] = {}
    end = 0
    for name, extent in extents.items():
        groups = extent.stop - extent.first
        for part, (dtype, shape, num_bytes) in PARTS.items():
            offsets = [end, end + groups * num_bytes]
            table[f"{name}.{part}"] = {"dtype": dtype, "shape": [groups, *shape], "data_offsets": offsets}
            end = offsets[1]
    weights = {name: [extent.first, extent.offset.hex()] for name, extent in extents.items()}
    description = json.dumps({"format": FORMAT, "key": key, "weights": weights})
    places = {name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in table.items()}
    return header_bytes(table, {_METADATA: description, _DIGEST: _digest(description, places)})


def read_piece(path: Path, key: str) -> tuple[Piece, int]:
    """Return (the piece by its header, bytes read).

    Raises DamagedPieceError, and OSError if the file is missing or cannot be read.
    """
    size = path.stat().st_size  # Raises the error of a missing file.
    if not path.is_file():  # Reading a pipe would wait for a writer.
        raise DamagedPieceError("it is not a file")
    try:
        segments, metadata = read_header_and_metadata(path)
        description = metadata.get(_METADATA, "")
        begin = min((segment.offset for segment in segments.values()), default=size)
        places = {
            name: (s.dtype, list(s.shape), [s.offset - begin, s.offset - begin + s.num_bytes])
            for name, s in segments.items()
        }
        if metadata.get(_DIGEST) != _digest(description, places):
            raise DamagedPieceError("its header was changed")
        values = json.loads(description)
        check_shape(values, {"format": int, "key": str, "weights": {"*": list}}, path, "remove it")
        if (values["format"], values["key"]) != (FORMAT, key):
            raise DamagedPieceError("it belongs to another entry")
        extents = {name: _extent(name, entry, segments) for name, entry in values["weights"].items()}
    except UserError as error:
        if not path.is_file():
            raise FileNotFoundError(path) from error
        raise DamagedPieceError(str(error)) from error
    except (KeyError, ValueError, OverflowError, RecursionError) as error:
        raise DamagedPieceError(f"its header is invalid: {error}") from error
    return Piece(path, extents), begin


def _extent(name: str, entry: Sequence[Any], segments: Mapping[str, Segment]) -> Extent:
    """Parse one weight's entry.

    Raises KeyError, ValueError or OverflowError for values that `header_of` does not write.
    """
    if [type(value) for value in entry] != [int, str] or not 0 <= entry[0] < 2**63:
        raise ValueError(f"{entry!r:.60} of {name}")
    first, offset = entry[0], float.fromhex(entry[1])
    parts = {part: segments[f"{name}.{part}"] for part in PARTS}
    groups = parts["codes"].shape[0] if parts["codes"].shape else 0
    for part, (dtype, shape, _) in PARTS.items():
        if (parts[part].dtype, parts[part].shape) != (dtype, (groups, *shape)):
            raise ValueError(f"{name}.{part}: {parts[part].shape} of {parts[part].dtype}")
    if not math.isfinite(offset):
        raise ValueError(f"{name}: {offset} as its offset")
    return Extent(first, first + groups, offset, parts)


def _digest(description: str, places: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([description, places], sort_keys=True).encode()).hexdigest()
