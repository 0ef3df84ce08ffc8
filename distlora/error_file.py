"""What a worker leaves for the launcher when it fails: RUN/logs/rank_<k>.error.json. Imports no torch."""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path

from distlora.config import UserError

VARIABLE = "DISTLORA_ERROR_FILE"
"""Environment variable: where this worker leaves its error. What ends a process from a thread finds the place here."""


def write(path: Path, error: BaseException, *, about: int | None = None) -> None:
    """Leave `error` at `path`, with a time fine enough to tell which rank failed first (torchrun's own error files have
    whole seconds). `about`: the rank that the error names, where that is another than the one that writes.
    """
    record = {
        "type": type(error).__name__,
        "message": str(error),
        "bad_input": isinstance(error, UserError),
        "about": about,
        "time": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }
    temporary = path.with_suffix(f".tmp-{os.getpid()}-{time.monotonic_ns()}")  # Two threads may write at once.
    temporary.write_text(json.dumps(record, indent=2))
    temporary.replace(path)


def leave(error: BaseException, *, about: int | None = None) -> None:
    """`write` where the launcher looks; nothing in a process that it did not start."""
    path = os.environ.get(VARIABLE)
    if path is not None:
        write(Path(path), error, about=about)
