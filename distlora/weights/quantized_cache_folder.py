"""Folder of the quantized-weights cache: entries, their pieces, last use and size. Needs no torch.

    FOLDER/<key>/                            an entry: one base, quantized in one way (`quantized_cache.cache_key`)
        entry.json                           base and number of groups; its mtime is the entry's last use
        00012-3of8-<hash>.safetensors        a piece: groups of the weights of one decoder layer
    FOLDER/sources/                          fingerprints of source files (`file_fingerprints`)

Names that begin with a dot are being written or removed. The folder may be a home or a project, so only plain files
with exactly these names are removed, only in folders that are not symlinks, and then the folder if it is empty. A piece
is written beside its name, fsynced and renamed. Pieces with the same name hold the same bytes, so any number of
processes writes at once without a lock.
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
from distlora.weights.quantized_cache_format import PIECE_NAME, DamagedPieceError, PieceName, holes, read_piece

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
_REMOVED = re.compile(r"\.removed-[0-9a-f]{12}-[0-9a-f]{16}")
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
        """Remove the entry in one step and return the bytes freed; processes that read its pieces finish reading.

        Files of other programs stay in place. Raises OSError if the entry is another user's and cannot be removed.
        """
        if not self.is_ours():  # Another process removed it.
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


def leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> Iterator[Path]:
    """Yield unfinished files and folders of killed writers that were not written for `older_than` seconds."""
    now = time.time()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_symlink() or not path.is_dir():
                continue
            abandoned: list[Path] = []
            if _KEY.fullmatch(path.name):
                abandoned = list(_files_in(path, _UNFINISHED))
            elif path.name == SOURCES:
                abandoned = list(_files_in(path, _UNFINISHED_SOURCE))
            with contextlib.suppress(OSError):
                if _REMOVED.fullmatch(path.name) and not _strangers_in(path):
                    abandoned = [path]
                yield from (each for each in abandoned if now - each.lstat().st_mtime >= older_than)


def remove_leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> int:
    """Remove `leftovers` and return the bytes freed. Files that cannot be removed stay."""
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
    """Remove the recorded fingerprints, so that source files are hashed again."""
    if _files_in(folder / SOURCES, _SOURCE, _UNFINISHED_SOURCE):
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


def _strangers_in(folder: Path) -> bool:
    """Return whether an entry holds files that no cache made. Raises OSError for an unreadable folder."""
    return bool(set(folder.iterdir()) - set(_files_in(folder, _FINISHED, _UNFINISHED)))


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
