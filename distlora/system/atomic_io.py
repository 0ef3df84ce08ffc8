"""Write files atomically and durably: readers see the old content or the new, and a power cut loses neither.

Also make folders that others cannot enter, and identify a file by its content.
"""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> None:
    """Make a folder that its owner alone can enter, and its parents as the umask says; leave one that exists.

    In a folder with the set-group-ID bit (chmod g+s), which a team shares, its group may enter as the umask says.
    """
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o770 if path.parent.stat().st_mode & stat.S_ISGID else 0o700, exist_ok=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` in one step by the file that `write(temporary)` makes."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; concurrent writers do not mix."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class AppendedFile:
    """A file that text is appended to, for readers that follow it; created by the first append.

    Text that a full disk refuses is kept in memory and written first once there is space, so none is lost, torn or
    reordered.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._pending = bytearray()

    def append(self, text: str) -> None:
        """Append text at once, so that a killed process loses nothing.

        Raises OSError if the disk refuses it; the text is kept.
        """
        self._pending += text.encode()
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        while self._pending:
            written = os.write(self._descriptor, self._pending)
            del self._pending[:written]

    def close(self) -> None:
        """Close the file. Raises OSError if the disk still refuses some text."""
        try:
            if self._pending:
                self.append("")
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def write_json(path: Path, value: Any) -> None:
    """Replace a file by indented JSON, as `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")
