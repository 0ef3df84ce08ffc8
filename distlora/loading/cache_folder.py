"""Where quantized shards are kept: entries, their pieces, last use and size. Imports no torch.

    FOLDER/<key>/                            an entry: one base, quantized in one way (`shard_cache.cache_key`)
        entry.json                           of what, and how large when whole; its mtime is the entry's last use
        00012-3of8-<hash>.safetensors        a piece: groups of the weights of one decoder block
    FOLDER/sources/                          what is known of source files (`source_digest`)

What begins with a dot is being written or removed. A piece is written beside its name, fsynced and renamed, so it is
whole or absent, and two that have one name hold the same bytes: any number of processes writes at once, without a lock.
Its name says which cut of the groups it is a part of, so a reader opens no other; its header says which groups of which
weights it holds. In it each weight has `codes`, `scales`, `group_scale` and `checksums`, one number a group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora import durable
from distlora.config import UserError
from distlora.json_files import check_shape, read_object
from distlora.loading.segments import Segment, read_header, read_metadata

FORMAT = 1
"""Of a piece. Another makes other keys."""
ENTRY_NAME = "entry.json"
SOURCES = "sources"

PARTS: Mapping[str, tuple[str, tuple[int, ...], int]] = {
    "codes": ("U8", (8192,), 8192),
    "scales": ("U8", (256,), 256),
    "group_scale": ("F32", (), 4),
    "checksums": ("I64", (), 8),
}
"""What a piece holds of a group, in this order: safetensors' dtype, shape and bytes."""
GROUP_BYTES = sum(num_bytes for *_, num_bytes in PARTS.values())

IN_USE_SECONDS = 600.0
"""An entry that a start has read or written within this time is not removed for want of space."""
ABANDONED_SECONDS = 3600.0
"""Seconds after which what begins with a dot belongs to a process that was killed: a piece is written in one."""

_KEY = re.compile(r"[0-9a-f]{64}")
_PIECE = re.compile(r"(\d{5,})-(\d+)of(\d+)-[0-9a-f]{16}\.safetensors")
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One base, quantized in one way."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    def begin(self, values: Mapping[str, Any]) -> None:
        """Make the entry where it is not there. Raises OSError where it cannot be."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / ENTRY_NAME).is_file():
            durable.write_json(self.path / ENTRY_NAME, {**values, "made": secrets.token_hex(8)})

    def content(self) -> str:
        """What entry.json says, the same to all who see this folder and to no others; empty where there is none."""
        path = self.path / ENTRY_NAME
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return path.read_text(encoding="utf-8") if path.is_file() else ""
        return ""

    def touch(self) -> None:
        """It is used now. On a disk that cannot be written its last use stays what it was."""
        with contextlib.suppress(OSError):
            os.utime(self.path / ENTRY_NAME)

    def last_use(self) -> float:
        """Seconds since the epoch."""
        for path in (self.path / ENTRY_NAME, self.path):
            with contextlib.suppress(OSError):
                return path.stat().st_mtime
        return 0.0  # It is removed at this moment.

    def piece_names(self) -> list[PieceName]:
        """Of every piece, by one look into the folder; none where it cannot be read."""
        try:
            names = sorted(os.listdir(self.path))
        except OSError:
            return []
        matches = ((name, _PIECE.fullmatch(name)) for name in names)
        return [PieceName(self.path / name, *map(int, match.groups())) for name, match in matches if match]

    def path_of(self, block: int, index: int, count: int, ranges: Mapping[str, range]) -> Path:
        """The piece of these groups, which all who write it write alike."""
        told = json.dumps([[name, groups.start, groups.stop] for name, groups in sorted(ranges.items())])
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return self.path / f"{block:05}-{index}of{count}-{digest}.safetensors"

    def bytes_on_disk(self) -> int:
        return _bytes_in(self.path)

    def remove(self) -> None:
        """Gone in one step; who reads its pieces at the moment reads them to their end. OSError where it may not be."""
        doomed = self.path.with_name(f".removed-{self.key[:12]}-{secrets.token_hex(8)}")
        with contextlib.suppress(FileNotFoundError):  # Another process was first.
            self.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


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
    header = {"__metadata__": {_METADATA: said, _DIGEST: _digest(said, places)}} | table
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_piece(path: Path, key: str) -> tuple[Piece, int]:
    """(the piece by its header, bytes that were read). Raises DamagedPieceError, and OSError where it is gone or cannot
    be read."""
    size = path.stat().st_size  # Says by its own error whether it is gone.
    if not path.is_file():  # Reading a pipe would wait for a writer.
        raise DamagedPieceError("it is no file")
    try:
        segments, metadata = read_header(path), read_metadata(path)
        said = metadata.get(_METADATA, "")
        begin = min((segment.offset for segment in segments.values()), default=size)
        places = {
            name: (s.dtype, list(s.shape), [s.offset - begin, s.offset - begin + s.num_bytes])
            for name, s in segments.items()
        }
        if metadata.get(_DIGEST) != _digest(said, places):
            raise DamagedPieceError("its header is not the one that was written")
        values = json.loads(said)
        if (values["format"], values["key"]) != (FORMAT, key):
            raise DamagedPieceError("it is of another entry")
        extents = {name: _extent(name, first, offset, segments) for name, (first, offset) in values["weights"].items()}
    except UserError as error:
        if not path.is_file():
            raise FileNotFoundError(path) from error
        raise DamagedPieceError(str(error)) from error
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedPieceError(f"its header says {error}, which no piece does") from error
    return Piece(path, extents), 2 * begin


def _extent(name: str, first: int, offset: str, segments: Mapping[str, Segment]) -> Extent:
    parts = {part: segments[f"{name}.{part}"] for part in PARTS}
    groups = parts["codes"].shape[0]
    for part, (dtype, shape, _) in PARTS.items():
        if (parts[part].dtype, parts[part].shape) != (dtype, (groups, *shape)) or first < 0:
            raise ValueError(f"{name}.{part}: {parts[part].shape} of {parts[part].dtype}")
    return Extent(first, first + groups, float.fromhex(offset), parts)


def _digest(said: str, places: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([said, places], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class EntryFigures:
    """What there is to say of an entry."""

    key: str
    base: str
    """Its name on the hub, or its folder."""
    num_bytes: int
    """On disk: what removal frees."""
    share: float
    """Of all groups, those that some piece holds; 1: a start on any number of ranks needs nothing else."""
    last_use: float
    """Seconds since the epoch."""


def entries(folder: Path) -> list[Entry]:
    """Every entry of a cache, the one that was used last first; none where there is no cache."""
    try:
        found = [Entry(path) for path in folder.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=Entry.last_use, reverse=True)


def figures_of(entry: Entry) -> EntryFigures:
    """Reads the header of every piece."""
    held: dict[str, list[tuple[int, int]]] = {}
    for name in entry.piece_names():
        with contextlib.suppress(OSError, DamagedPieceError):
            for weight, extent in read_piece(name.path, entry.key)[0].extents.items():
                held.setdefault(weight, []).append((extent.first, extent.stop))
    base, share = "unknown", 0.0
    with contextlib.suppress(OSError, UserError, OverflowError, ZeroDivisionError):
        values = read_object(entry.path / ENTRY_NAME, "remove the entry")
        check_shape(values, {"base": str, "weights": {"*": int}}, entry.path / ENTRY_NAME, "remove the entry")
        base, weights = values["base"], values["weights"]
        lacking = sum(
            len(hole) for name, groups in weights.items() for hole in holes(range(groups), held.get(name, []))
        )
        share = 1 - lacking / sum(len(range(groups)) for groups in weights.values())
    return EntryFigures(entry.key, base, entry.bytes_on_disk(), share, entry.last_use())


def make_room(folder: Path, own: Entry, own_bytes: int, limit: int | None) -> tuple[list[EntryFigures], bool]:
    """Remove the entries that were used longest ago until `own`, when it takes `own_bytes`, fits beside the others.

    Returns (what was removed, whether it fits now). Entries that a start uses at the moment stay.
    """
    if limit is None:
        return [], True
    others = [(entry, entry.bytes_on_disk()) for entry in entries(folder) if entry.key != own.key]
    total = own_bytes + sum(size for _, size in others)
    removed = []
    for entry, size in reversed(others):
        if total <= limit or own_bytes > limit:
            break
        if time.time() - entry.last_use() < IN_USE_SECONDS:
            continue
        removed.append(figures_of(entry))
        entry.remove()
        total -= size
    return removed, total <= limit


def leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> Iterator[Path]:
    """What killed writers left: unfinished files and folders of which nothing was written for so many seconds."""
    for place in [folder, folder / SOURCES, *(entry.path for entry in entries(folder))]:
        with contextlib.suppress(OSError):
            for path in place.iterdir():
                if path.name.startswith(".") and time.time() - path.lstat().st_mtime >= older_than:
                    yield path


def remove_leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> int:
    """Returns the bytes that they took. What cannot be removed stays."""
    freed = 0
    for path in list(leftovers(folder, older_than=older_than)):
        with contextlib.suppress(OSError):
            size = _bytes_in(path) if path.is_dir() else path.lstat().st_size
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            freed += size
    return freed


def forget_sources(folder: Path) -> None:
    """Source files are hashed again, when a start needs to know what they hold."""
    shutil.rmtree(folder / SOURCES, ignore_errors=True)


def _bytes_in(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            with contextlib.suppress(OSError):  # Renamed or removed at this moment.
                total += entry.stat(follow_symlinks=False).st_size
    return total
