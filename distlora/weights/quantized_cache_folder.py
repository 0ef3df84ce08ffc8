"""Where quantized shards are kept: entries, their pieces, last use and size. Imports no torch.

    FOLDER/<key>/                            an entry: one base, quantized in one way (`shard_cache.cache_key`)
        entry.json                           of what, and how large when whole; its mtime is the entry's last use
        00012-3of8-<hash>.safetensors        a piece: groups of the weights of one decoder block
    FOLDER/sources/                          what is known of source files (`source_digest`)

What begins with a dot is being written or removed. Nothing is ever removed but plain files whose whole name is one of
these, in folders that are no links, and then the folder where it is empty: the cache's folder may be a home or a
project, and others' files and links may lie in it. A piece is written beside its name, fsynced and renamed, so it is
whole or absent, and two that have one name hold the same bytes: any number of processes writes at once, without a lock.
What is in one: `piece_header`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import check_shape, read_object
from distlora.system import atomic_io
from distlora.weights.quantized_cache_format import (
    PIECE_NAME,
    DamagedPieceError,
    PieceName,
    holes,
    read_piece,
)

ENTRY_NAME = "entry.json"
SOURCES = "sources"

IN_USE_SECONDS = 600.0
"""An entry that a start has read or written within this time is not removed for want of space."""
ABANDONED_SECONDS = 3600.0
"""Seconds after which what begins with a dot belongs to a process that was killed: a piece is written in one."""

_KEY = re.compile(r"[0-9a-f]{64}")
_FINISHED = re.compile(rf"{re.escape(ENTRY_NAME)}|{PIECE_NAME.pattern}")
_UNFINISHED = re.compile(rf"\.({_FINISHED.pattern})-[0-9a-f]{{16}}")
"""What `durable` writes in an entry before it has its name."""
_REMOVED = re.compile(r"\.removed-[0-9a-f]{12}-[0-9a-f]{16}")
_SOURCE = re.compile(r"source-[0-9a-f]{32}\.json")
_UNFINISHED_SOURCE = re.compile(rf"\.{_SOURCE.pattern}-[0-9a-f]{{16}}")


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
        if self.path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link is in an entry's place", str(self.path))
        if not (self.path / ENTRY_NAME).is_file():
            atomic_io.write_json(self.path / ENTRY_NAME, {**values, "made": secrets.token_hex(8)})

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
            names = sorted(os.listdir(self.path)) if not self.path.is_symlink() else []
        except OSError:
            return []
        found = (PieceName.of(self.path / name) for name in names)
        return [name for name in found if name is not None]

    def pieces_of_blocks(self) -> dict[int, list[PieceName]]:
        """`piece_names` by block."""
        found: dict[int, list[PieceName]] = {}
        for name in self.piece_names():
            found.setdefault(name.block, []).append(name)
        return found

    def path_of(self, block: int, index: int, count: int, ranges: Mapping[str, range]) -> Path:
        """The piece of these groups, which all who write it write alike."""
        told = json.dumps([[name, groups.start, groups.stop] for name, groups in sorted(ranges.items())])
        digest = hashlib.sha256(told.encode()).hexdigest()[:16]
        return self.path / f"{block:05}-{index}of{count}-{digest}.safetensors"

    def is_ours(self) -> bool:
        """Whether a cache made this folder: it holds what no other program's folder of such a name does."""
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        return bool(_description(self.path)) or bool(self.piece_names())

    def bytes_on_disk(self) -> int:
        return sum(_files_in(self.path, _FINISHED, _UNFINISHED).values())

    def remove(self) -> int:
        """Gone in one step; who reads its pieces at the moment reads them to their end. Returns the bytes that this
        freed. What is no cache's stays, in its place. Raises OSError where another user's may not be removed."""
        if not self.is_ours():  # Another process was first.
            return 0
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
        doomed = self.path
        if not _strangers_in(self.path):
            doomed = self.path.with_name(f".removed-{self.key[:12]}-{secrets.token_hex(8)}")
            try:
                self.path.rename(doomed)
            except FileNotFoundError:
                return 0
        return _remove_files(doomed, _FINISHED, _UNFINISHED)


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
        found = [Entry(path) for path in folder.iterdir() if _KEY.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((entry for entry in found if entry.is_ours()), key=Entry.last_use, reverse=True)


def figures_of(entry: Entry) -> EntryFigures:
    """Reads the header of every piece."""
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


def make_room(folder: Path, own: Entry, own_bytes: int, limit: int | None) -> tuple[list[EntryFigures], bool]:
    """Remove the entries that were used longest ago until `own`, when it takes `own_bytes`, fits beside the others.

    Returns (what was removed, whether it fits now). Entries that a start uses at the moment stay.
    """
    if limit is None:
        return [], True
    others = [(entry, entry.bytes_on_disk()) for entry in entries(folder) if entry.key != own.key]
    total = own_bytes + sum(size for _, size in others)
    removed = []
    for entry, _ in reversed(others):
        if total <= limit or own_bytes > limit:
            break
        if time.time() - entry.last_use() < IN_USE_SECONDS:
            continue
        figures = figures_of(entry)
        with contextlib.suppress(OSError):  # Another user's: it stays, and counts.
            total -= entry.remove()
            removed.append(figures)
    return removed, total <= limit


def _description(folder: Path) -> dict[str, Any]:
    """What the entry.json of a cache says; empty where there is none, or another program's."""
    path = folder / ENTRY_NAME
    with contextlib.suppress(OSError, UserError):
        if not path.is_symlink():
            values = read_object(path, "remove the entry")
            shape = {"base": str, "format": int, "made": str, "weights": {"*": int}}
            check_shape(values, shape, path, "remove the entry")
            return values
    return {}


def leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> Iterator[Path]:
    """What killed writers left: unfinished files and folders of which nothing was written for so many seconds."""
    now = time.time()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_symlink() or not path.is_dir():
                continue
            found: list[Path] = []
            if _KEY.fullmatch(path.name):
                found = list(_files_in(path, _UNFINISHED))
            elif path.name == SOURCES:
                found = list(_files_in(path, _UNFINISHED_SOURCE))
            with contextlib.suppress(OSError):
                if _REMOVED.fullmatch(path.name) and not _strangers_in(path):
                    found = [path]
                yield from (own for own in found if now - own.lstat().st_mtime >= older_than)


def remove_leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> int:
    """Returns the bytes that they took. What cannot be removed stays."""
    freed = 0
    for path in list(leftovers(folder, older_than=older_than)):
        with contextlib.suppress(OSError):
            if path.is_dir():
                freed += _remove_files(path, _FINISHED, _UNFINISHED)
            else:
                size = path.lstat().st_size
                path.unlink()
                freed += size
    return freed


def forget_sources(folder: Path) -> None:
    """Source files are hashed again, when a start needs to know what they hold."""
    if _files_in(folder / SOURCES, _SOURCE, _UNFINISHED_SOURCE):
        _remove_files(folder / SOURCES, _SOURCE, _UNFINISHED_SOURCE)


def _files_in(folder: Path, *names: re.Pattern[str]) -> dict[Path, int]:
    """The plain files in a folder whose whole names are such, with their bytes; none in a link to a folder."""
    found: dict[Path, int] = {}
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            for path in folder.iterdir():
                if any(name.fullmatch(path.name) for name in names):
                    with contextlib.suppress(OSError):  # Renamed or removed at this moment.
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode):
                            found[path] = status.st_size
    return found


def _strangers_in(folder: Path) -> bool:
    """Whether anything lies in an entry that no cache has put there. Raises OSError for one that cannot be read."""
    return bool(set(folder.iterdir()) - set(_files_in(folder, _FINISHED, _UNFINISHED)))


def _remove_files(folder: Path, *names: re.Pattern[str]) -> int:
    """Remove the plain files in a folder whose whole names are such, and the folder where nothing else is in it.

    Returns the bytes that this freed. What cannot be removed stays.
    """
    freed = 0
    for path, size in _files_in(folder, *names).items():
        with contextlib.suppress(OSError):
            path.unlink()
            freed += size
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed
