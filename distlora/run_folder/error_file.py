"""What a worker leaves for the launcher when it fails: RUN/logs/rank_<k>.error.json. Imports no torch."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

from distlora.config import UserError

VARIABLE = "DISTLORA_ERROR_FILE"
"""Environment variable: where this worker leaves its error. What ends a process from a thread finds the place here."""
SPARE = "DISTLORA_SPARE_ERROR_FILE"
"""Environment variable: a file on this machine that has its space already, for where the disk takes nothing more."""
SPARE_BYTES = 32 * 1024
_LONGEST_SPARE_MESSAGE = 2000
"""Of at most 12 bytes each."""


def write(path: Path, error: BaseException, *, about: int | None = None) -> None:
    """Leave `error` at `path`, with a time fine enough to tell which rank failed first (torchrun's own error files have
    whole seconds). `about`: the rank that the error names, where that is another than the one that writes.
    """
    record = _record(error, about) | {"traceback": "".join(traceback.format_exception(error))}
    temporary = path.with_suffix(f".tmp-{os.getpid()}-{time.monotonic_ns()}")  # Two threads may write at once.
    try:
        temporary.write_text(json.dumps(record, indent=2))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def leave(error: BaseException, *, about: int | None = None) -> None:
    """`write` where the launcher looks; nothing in a process that it did not start. A disk that is full to the end, of
    which a run then dies, does not keep the reason: it goes into the spare file.
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
    """Make the spare file, or empty it. It holds no error until one is left there."""
    _fill(path, "")
    os.environ[SPARE] = str(path)


def _fill(path: Path, text: str) -> None:
    """Over what is there, at the same length: that takes no space."""
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
