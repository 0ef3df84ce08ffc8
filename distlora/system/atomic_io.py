"""Writing what must survive: readers see the old content or the new one, never half, and a power cut loses neither."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)` makes the new file, which then takes the place of `path` in one step."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step; two writers do not mix."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class AppendedFile:
    """A file that text is appended to, for readers who follow it; made with the first. What a full disk does not take
    yet is kept in memory, and goes first when there is space: no text is cut by it, torn or out of order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._pending = bytearray()

    def append(self, text: str) -> None:
        """At the end, at once: a killed process loses nothing of it, only the machine can. Raises OSError where the
        disk does not take it; the text is kept then."""
        self._pending += text.encode()
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        while self._pending:
            written = os.write(self._descriptor, self._pending)
            del self._pending[:written]

    def close(self) -> None:
        """Raises OSError where the disk still does not take all of it."""
        try:
            if self._pending:
                self.append("")
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")
