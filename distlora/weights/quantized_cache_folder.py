"""Folder of the quantized-weights cache: its entries, their last use and size, and their removal. Needs no torch.

    FOLDER/<key>/                     an entry: one base, quantized in one way (`load_base.QuantizedCache`)
        entry.json                    base, checksums and ranks; its mtime is the entry's last use
        config.json, model*           the quantized weights as bitsandbytes stores them
    FOLDER/.<key>-<hex digits>/       an entry that is being written or removed, or that a killed process left

The folder may be a home or a project, so only plain files with these names are removed, only in folders that are not
symlinks, and then the folder if it is empty. Entries of older versions, which have files of one rank each, are listed
and removed, but never read.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distlora.config import UserError
from distlora.config.json_files import read_object

ENTRY_NAME = "entry.json"
IN_USE_SECONDS = 600.0
"""Seconds since its last use in which an entry is not removed to make room."""
ABANDONED_SECONDS = 3600.0
"""Seconds after which an unfinished entry was left by a killed process."""

_KEY = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{16}")
_FILE = re.compile(
    r"\.?(entry\.json|config\.json|model\.safetensors\.index\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|\d{5,}-\d+of\d+-[0-9a-f]{16}\.safetensors)(-[0-9a-f]{16})?"
)
"""Names of an entry's files, those of older versions and the temporary ones of `atomic_io` among them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One base, quantized in one way."""

    path: Path
    base: str
    """Name on the hub, or folder."""
    num_bytes: int
    """Bytes that removal frees."""
    last_use: float
    """Seconds since the epoch."""

    @property
    def key(self) -> str:
        """The folder's name."""
        return self.path.name


def entries(folder: Path) -> list[Entry]:
    """List the entries of a cache, most recently used first; empty if there is no cache."""
    kept = []
    for path in _folders(folder, _KEY):
        with contextlib.suppress(OSError, UserError):
            base = read_object(path / ENTRY_NAME, "remove it", {"base": str, "format": int})["base"]
            last_use = (path / ENTRY_NAME).stat().st_mtime
            kept.append(Entry(path, base, sum(size for _, size, _ in _files(path)), last_use))
    return sorted(kept, key=lambda entry: -entry.last_use)


def touch(path: Path) -> None:
    """Record a use of the entry at `path`. On a read-only disk nothing is recorded."""
    with contextlib.suppress(OSError):
        os.utime(path / ENTRY_NAME)


def remove(path: Path) -> int:
    """Remove the entry at `path` and return the bytes freed; processes that read its files finish reading.

    Files of other programs stay in place. Raises OSError if a file cannot be removed: the entry is another user's.
    """
    freed, place = 0, path
    if _KEY.fullmatch(path.name):  # Nobody begins to read it, and if this process is killed, a start removes the rest.
        place = path.rename(path.with_name(f".{path.name}-{secrets.token_hex(8)}"))
    try:
        # entry.json last: what cannot be removed is still listed.
        for file, size, _ in sorted(_files(place), key=lambda listed: listed[0].name == ENTRY_NAME):
            file.unlink(missing_ok=True)
            freed += size
    except OSError:
        place.rename(path)
        raise
    with contextlib.suppress(OSError):
        if any(place.iterdir()):  # It holds other files.
            place.rename(path)
        else:
            place.rmdir()
    return freed


def remove_leftovers(folder: Path, *, older_than: float = ABANDONED_SECONDS) -> int:
    """Remove unfinished entries that nobody wrote for `older_than` seconds; return the bytes freed."""
    freed = 0
    for path in _folders(folder, _UNFINISHED):
        with contextlib.suppress(OSError):
            last_write = max([path.stat().st_mtime, *(written for *_, written in _files(path))])
            if time.time() - last_write >= older_than:
                freed += remove(path)
    return freed


def make_room(folder: Path, key: str, num_bytes: int, limit: int | None) -> tuple[list[Entry], bool]:
    """Remove the least recently used entries until one of `num_bytes` fits beside the others within `limit`.

    Returns (removed entries, whether it fits). Entries in use and those of other users stay.
    """
    removed: list[Entry] = []
    if limit is None or num_bytes > limit:
        return removed, limit is None
    others = [entry for entry in entries(folder) if entry.key != key]
    total = num_bytes + sum(entry.num_bytes for entry in others)
    for entry in reversed(others):
        if total > limit and time.time() - entry.last_use >= IN_USE_SECONDS:
            with contextlib.suppress(OSError):
                total -= remove(entry.path)
                removed.append(entry)
    return removed, total <= limit


def _folders(folder: Path, name: re.Pattern[str]) -> Iterator[Path]:
    """Yield the folders of such names in the cache, no symlinks among them; nothing if there is no cache."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """Return (path, bytes, time of the last write) of an entry's plain files."""
    files = []
    with os.scandir(folder) as listed:
        for file in listed:
            if _FILE.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # Renamed or removed meanwhile.
                    status = file.stat(follow_symlinks=False)
                    files.append((folder / file.name, status.st_size, status.st_mtime))
    return files
