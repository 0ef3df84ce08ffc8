"""RUN/logs/rank_<k>.error.json: the error that a failed worker leaves for the launcher. Needs no torch."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

from distlora.config import UserError

VARIABLE = "DISTLORA_ERROR_FILE"
"""Environment variable with the path of this worker's error file."""
SPARE = "DISTLORA_SPARE_ERROR_FILE"
"""Environment variable with the path of a preallocated file on this node, used if the disk is full."""
SPARE_BYTES = 32 * 1024
_LONGEST_SPARE_MESSAGE = 2000
"""Characters, each of at most 12 bytes."""


def write(path: Path, error: BaseException, *, about: int | None = None) -> None:
    """Write `error` to `path` with a fine timestamp, by which the launcher tells which rank failed first.

    `about`: the rank that the error names, if it is not the writing one.
    """
    record = _record(error, about) | {"traceback": "".join(traceback.format_exception(error))}
    temporary = path.with_suffix(f".tmp-{os.getpid()}-{time.monotonic_ns()}")  # Two threads may write at once.
    try:
        temporary.write_text(json.dumps(record, indent=2))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def leave(error: BaseException, *, about: int | None = None) -> None:
    """Write the error file for the launcher; do nothing in a process that it did not start.

    On a full disk the error goes into the spare file.
    """
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    try:
        write(Path(path), error, about=about)
    except OSError:
        spare = os.environ.get(SPARE)
        if spare is None:
            raise
        record = _record(error, about)
        record["message"] = record["message"][:_LONGEST_SPARE_MESSAGE]
        _fill(Path(spare), json.dumps(record))


def make_spare(path: Path) -> None:
    """Create or empty the spare file."""
    _fill(path, "")
    os.environ[SPARE] = str(path)


def _fill(path: Path, text: str) -> None:
    """Overwrite the file at constant length, which needs no disk space."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text.encode().ljust(SPARE_BYTES))
    finally:
        os.close(descriptor)


def _record(error: BaseException, about: int | None) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "bad_input": isinstance(error, UserError),
        "about": about,
        "time": time.time(),
    }
