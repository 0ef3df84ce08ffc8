"""Pieces of the cache of quantized shards: their names, and what their headers say. Imports no torch.

A piece's name says which cut of the groups it is a part of, so a reader opens no other; its header says which groups of
which weights it holds. In it each weight has `codes`, `scales`, `group_scale` and `checksums`, one number a group.
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
"""Of a piece. Another makes other keys."""
PARTS: Mapping[str, tuple[str, tuple[int, ...], int]] = {
    "codes": ("U8", (8192,), 8192),
    "scales": ("U8", (256,), 256),
    "group_scale": ("F32", (), 4),
    "checksums": ("I64", (), 8),
}
"""What a piece holds of a group, in this order: safetensors' dtype, shape and bytes."""
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
    """The weight's, which all groups share."""
    parts: Mapping[str, Segment]
    """Where each of PARTS lies in the piece; empty for what is not written yet."""


@dataclass(frozen=True, slots=True)
class Piece:
    path: Path
    extents: Mapping[str, Extent]
    """By the weight's Hugging Face name."""


@dataclass(frozen=True, slots=True)
class PieceName:
    """What the name of a piece says."""

    path: Path
    block: int
    index: int
    count: int

    @classmethod
    def of(cls, path: Path) -> PieceName | None:
        """None where no piece is named so."""
        match = PIECE_NAME.fullmatch(path.name)
        name = cls(path, *map(int, match.groups())) if match else None
        return name if name is not None and name.index < name.count else None

    def may_hold(self, num_groups: int, groups: range) -> bool:
        """Whether some of these groups of a weight of `num_groups` may be in the piece."""
        own = cut(num_groups, self.index, self.count)
        return own.start < groups.stop and groups.start < own.stop


def cut(num_groups: int, index: int, count: int) -> range:
    """The groups of a weight that are number `index` of `count` ranks' own."""
    each = -(-num_groups // count)
    return range(min(index * each, num_groups), min((index + 1) * each, num_groups))


def holes(groups: range, held: Sequence[tuple[int, int]]) -> list[range]:
    """The parts of `groups` that none of `held` (first, stop) covers."""
    found, at = [], groups.start
    for first, stop in sorted(held):
        if first > at:
            found.append(range(at, min(first, groups.stop)))
        at = max(at, stop)
        if at >= groups.stop:
            break
    if at < groups.stop:
        found.append(range(at, groups.stop))
    return [hole for hole in found if hole]


def header_of(key: str, extents: Mapping[str, Extent]) -> bytes:
    """The first bytes of a piece: safetensors' header of its weights, in their order."""
    table: dict[str, Any] = {}
    end = 0
    for name, extent in extents.items():
        groups = extent.stop - extent.first
        for part, (dtype, shape, num_bytes) in PARTS.items():
            offsets = [end, end + groups * num_bytes]
            table[f"{name}.{part}"] = {"dtype": dtype, "shape": [groups, *shape], "data_offsets": offsets}
            end = offsets[1]
    weights = {name: [extent.first, extent.offset.hex()] for name, extent in extents.items()}
    said = json.dumps({"format": FORMAT, "key": key, "weights": weights})
    places = {name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in table.items()}
    return header_bytes(table, {_METADATA: said, _DIGEST: _digest(said, places)})


def read_piece(path: Path, key: str) -> tuple[Piece, int]:
    """(the piece by its header, bytes that were read). Raises DamagedPieceError, and OSError where it is gone or cannot
    be read."""
    size = path.stat().st_size  # Says by its own error whether it is gone.
    if not path.is_file():  # Reading a pipe would wait for a writer.
        raise DamagedPieceError("it is no file")
    try:
        segments, metadata = read_header_and_metadata(path)
        said = metadata.get(_METADATA, "")
        begin = min((segment.offset for segment in segments.values()), default=size)
        places = {
            name: (s.dtype, list(s.shape), [s.offset - begin, s.offset - begin + s.num_bytes])
            for name, s in segments.items()
        }
        if metadata.get(_DIGEST) != _digest(said, places):
            raise DamagedPieceError("its header is not the one that was written")
        values = json.loads(said)
        check_shape(values, {"format": int, "key": str, "weights": {"*": list}}, path, "remove it")
        if (values["format"], values["key"]) != (FORMAT, key):
            raise DamagedPieceError("it is of another entry")
        extents = {name: _extent(name, said_of, segments) for name, said_of in values["weights"].items()}
    except UserError as error:
        if not path.is_file():
            raise FileNotFoundError(path) from error
        raise DamagedPieceError(str(error)) from error
    except (KeyError, ValueError, OverflowError, RecursionError) as error:
        raise DamagedPieceError(f"its header says {error}, which no piece does") from error
    return Piece(path, extents), begin


def _extent(name: str, said: Sequence[Any], segments: Mapping[str, Segment]) -> Extent:
    """Raises KeyError, ValueError and OverflowError for what `header_of` does not write."""
    if [type(value) for value in said] != [int, str] or not 0 <= said[0] < 2**63:
        raise ValueError(f"{said!r:.60} of {name}")
    first, offset = said[0], float.fromhex(said[1])
    parts = {part: segments[f"{name}.{part}"] for part in PARTS}
    groups = parts["codes"].shape[0] if parts["codes"].shape else 0
    for part, (dtype, shape, _) in PARTS.items():
        if (parts[part].dtype, parts[part].shape) != (dtype, (groups, *shape)):
            raise ValueError(f"{name}.{part}: {parts[part].shape} of {parts[part].dtype}")
    if not math.isfinite(offset):
        raise ValueError(f"{name}: {offset} as its offset")
    return Extent(first, first + groups, offset, parts)


def _digest(said: str, places: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([said, places], sort_keys=True).encode()).hexdigest()
