"""Folder of the quantized-weights cache: entries, their pieces, last use and size. Needs no torch.

    FOLDER/<key>/                            an entry: one base, quantized in one way (`quantized_cache.cache_key`)
        entry.json                           base and number of groups; its mtime is the entry's last use
        00012-3of8-<hash>.safetensors        a piece: groups of the weights of decoder layer 12, of shard 3 of 8
    FOLDER/sources/                          fingerprints of source files (`base_fingerprint`)

The folder may be a home or a project, so only plain files with exactly these names are removed, only in folders that
are not symlinks, and then the folder if it is empty. A piece is written beside its name, after a dot, fsynced and
renamed. Pieces with the same name hold the same bytes, so any number of processes writes at once without a lock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.safetensors_headers import Segment, header_bytes, read_header_and_metadata
from distlora.config import UserError
from distlora.config.json_files import check_shape, read_object
from distlora.system import atomic_io

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
    """Extent by the weight's Hugging Face name."""


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


ENTRY_NAME = "entry.json"
SOURCES = "sources"

IN_USE_SECONDS = 600.0
"""Seconds since its last use in which an entry is not removed to make room."""
ABANDONED_SECONDS = 3600.0
"""Seconds after which a name that begins with a dot was left by a killed process."""

_KEY = re.compile(r"[0-9a-f]{64}")
_FINISHED = re.compile(rf"{re.escape(ENTRY_NAME)}|{PIECE_NAME.pattern}")
_UNFINISHED = re.compile(rf"\.({_FINISHED.pattern})-[0-9a-f]{{16}}")
"""Temporary names of `atomic_io` in an entry."""
_SOURCE = re.compile(r"source-[0-9a-f]{32}\.json")
_UNFINISHED_SOURCE = re.compile(rf"\.{_SOURCE.pattern}-[0-9a-f]{{16}}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One base, quantized in one way."""

    path: Path

    @property
    def key(self) -> str:
        """Cache key: the folder's name."""
        return self.path.name

    def begin(self, values: Mapping[str, Any]) -> None:
        """Create the entry unless it exists. Raises OSError if it cannot."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link is in an entry's place", str(self.path))
        if not (self.path / ENTRY_NAME).is_file():
            atomic_io.write_json(self.path / ENTRY_NAME, {**values, "made": secrets.token_hex(8)})

    def content(self) -> str:
        """Return the text of entry.json, which differs between folders; empty if there is none."""
        path = self.path / ENTRY_NAME
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return path.read_text(encoding="utf-8") if path.is_file() else ""
        return ""

    def touch(self) -> None:
        """Record a use. On a read-only disk nothing is recorded."""
        with contextlib.suppress(OSError):
            os.utime(self.path / ENTRY_NAME)

    def last_use(self) -> float:
        """Return the time of the last use, in seconds since the epoch."""
        for path in (self.path / ENTRY_NAME, self.path):
            with contextlib.suppress(OSError):
                return path.stat().st_mtime
        return 0.0  # It is being removed.

    def piece_names(self) -> list[PieceName]:
        """List the pieces; empty if the folder cannot be read."""
        try:
            names = sorted(os.listdir(self.path)) if not self.path.is_symlink() else []
        except OSError:
            return []
        parsed = (PieceName.of(self.path / name) for name in names)
        return [name for name in parsed if name is not None]

    def pieces_of_blocks(self) -> dict[int, list[PieceName]]:
        """Return `piece_names` by decoder layer."""
        by_block: dict[int, list[PieceName]] = {}
        for name in self.piece_names():
            by_block.setdefault(name.block, []).append(name)
        return by_block

    def path_of(self, block: int, index: int, count: int, ranges: Mapping[str, range]) -> Path:
        """Return the path of the piece that holds these groups, the same for all processes."""
        key = json.dumps([[name, groups.start, groups.stop] for name, groups in sorted(ranges.items())])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self.path / f"{block:05}-{index}of{count}-{digest}.safetensors"

    def is_ours(self) -> bool:
        """Return whether a cache made this folder: it holds files that no other program makes."""
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        return bool(_description(self.path)) or bool(self.piece_names())

    def bytes_on_disk(self) -> int:
        """Return the bytes of the entry's files."""
        return sum(_files_in(self.path, _FINISHED, _UNFINISHED).values())

    def remove(self) -> int:
        """Remove the entry and return the bytes freed; processes that read its pieces finish reading.

        Files of other programs stay in place. Raises OSError if the entry is another user's and cannot be removed.
        """
        if not self.is_ours():  # Another process removed it.
            return 0
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
        return _remove_files(self.path, _FINISHED, _UNFINISHED)


@dataclass(frozen=True, slots=True)
class EntryFigures:
    """Figures of an entry for people."""

    key: str
    base: str
    """Name on the hub, or folder."""
    num_bytes: int
    """Bytes on disk that removal frees."""
    share: float
    """Fraction of all groups that some piece holds; at 1 a start on any number of ranks reads nothing else."""
    last_use: float
    """Seconds since the epoch."""


def entries(folder: Path) -> list[Entry]:
    """List the entries of a cache, most recently used first; empty if there is no cache."""
    try:
        candidates = [Entry(path) for path in folder.iterdir() if _KEY.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((entry for entry in candidates if entry.is_ours()), key=Entry.last_use, reverse=True)


def figures_of(entry: Entry) -> EntryFigures:
    """Return an entry's figures. Reads the header of every piece."""
    held: dict[str, list[tuple[int, int]]] = {}
    for name in entry.piece_names():
        with contextlib.suppress(OSError, DamagedPieceError):
            for weight, extent in read_piece(name.path, entry.key)[0].extents.items():
                held.setdefault(weight, []).append((extent.first, extent.stop))
    base, share = "unknown", 0.0
    with contextlib.suppress(KeyError, OverflowError, ZeroDivisionError):
        values = _description(entry.path)
        base, weights = values["base"], values["weights"]
        lacking = sum(
            len(hole) for name, groups in weights.items() for hole in holes(range(groups), held.get(name, []))
        )
        share = 1 - lacking / sum(len(range(groups)) for groups in weights.values())
    return EntryFigures(entry.key, base, entry.bytes_on_disk(), share, entry.last_use())


def make_room(folder: Path, entry: Entry, entry_bytes: int, limit: int | None) -> tuple[list[EntryFigures], bool]:
    """Remove the least recently used entries until `entry`, at `entry_bytes`, fits beside the others within `limit`.

    Returns (removed entries, whether it fits). Entries in use stay.
    """
    if limit is None:
        return [], True
    others = [(other, other.bytes_on_disk()) for other in entries(folder) if other.key != entry.key]
    total = entry_bytes + sum(size for _, size in others)
    removed = []
    for other, _ in reversed(others):
        if total <= limit or entry_bytes > limit:
            break
        if time.time() - other.last_use() < IN_USE_SECONDS:
            continue
        figures = figures_of(other)
        with contextlib.suppress(OSError):  # Another user's entry stays and counts.
            total -= other.remove()
            removed.append(figures)
    return removed, total <= limit


def _description(folder: Path) -> dict[str, Any]:
    """Return the content of a cache's entry.json; empty if there is none or it is another program's."""
    path = folder / ENTRY_NAME
    with contextlib.suppress(OSError, UserError):
        if not path.is_symlink():
            values = read_object(path, "remove the entry")
            shape = {"base": str, "format": int, "made": str, "weights": {"*": int}}
            check_shape(values, shape, path, "remove the entry")
            return values
    return {}


def remove_leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> int:
    """Remove what killed writers left and nobody wrote for `older_than` seconds; return the bytes freed.

    Files that cannot be removed stay.
    """
    freed, limit = 0, time.time() - older_than
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name == SOURCES or _KEY.fullmatch(path.name):
                for file, size in _files_in(path, _UNFINISHED, _UNFINISHED_SOURCE).items():
                    with contextlib.suppress(OSError):
                        if file.lstat().st_mtime <= limit:
                            file.unlink()
                            freed += size
    return freed


def forget_sources(folder: Path) -> None:
    """Remove the recorded fingerprints, so that source files are hashed again."""
    _remove_files(folder / SOURCES, _SOURCE, _UNFINISHED_SOURCE)


def _files_in(folder: Path, *names: re.Pattern[str]) -> dict[Path, int]:
    """Return the plain files in a folder whose names match, with their sizes; none if the folder is a symlink."""
    matching: dict[Path, int] = {}
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            for path in folder.iterdir():
                if any(name.fullmatch(path.name) for name in names):
                    with contextlib.suppress(OSError):  # Renamed or removed meanwhile.
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode):
                            matching[path] = status.st_size
    return matching


def _remove_files(folder: Path, *names: re.Pattern[str]) -> int:
    """Remove the plain files in a folder whose names match, then the folder if it is empty; return the bytes freed.

    Files that cannot be removed stay.
    """
    freed = 0
    for path, size in _files_in(folder, *names).items():
        with contextlib.suppress(OSError):
            path.unlink()
            freed += size
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed
