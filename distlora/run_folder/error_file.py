"""RUN/logs/rank_<k>.error.json: the error that a failed worker leaves for the launcher. Needs no torch."""

import json
import os
import time
import traceback
from pathlib import Path

from distlora.config import UserError

VARIABLE = "DISTLORA_ERROR_FILE"
"""Environment variable with the path of this worker's error file."""
SPARE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the path of a file on this node that torch's agent reads, used if the disk of the first is
full."""


def write(path: Path, error: BaseException, *, about: int | None = None) -> None:
    """Write `error` to `path` with a fine timestamp, by which the launcher tells which rank failed first.

    `about`: the rank that the error names, if it is not the writing one.
    """
    record = {
        "type": type(error).__name__,
        "message": "\n".join([str(error), *getattr(error, "__notes__", ())]),
        "bad_input": isinstance(error, UserError),
        "about": about,
        "time": time.time(),
        "traceback": "".join(traceback.format_exception(error)),
    }
    temporary = path.with_suffix(f".tmp-{os.getpid()}-{time.monotonic_ns()}")  # Two threads may write at once.
    try:
        temporary.write_text(json.dumps(record, indent=2))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def leave(error: BaseException, *, about: int | None = None) -> None:
    """Write the error file for the launcher; do nothing in a process that it did not start."""
    path, spare = os.environ.get(VARIABLE), os.environ.get(SPARE)
    if path is None:
        return
    try:
        write(Path(path), error, about=about)
    except OSError:
        if spare is None:
            raise
        write(Path(spare), error, about=about)
