"""Process several tensors at once and report progress."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TypeVar

from distlora.system.numbers import size
from distlora_kernels.dispatch import threads_of_one

Say = Callable[[str], None]
"""Takes a progress line; prints one now and then."""
WORKERS = min(4, len(os.sched_getaffinity(0)))
"""Tensors at once; each holds a few pieces of 4 MiB in memory."""

SETTLED_SECONDS = 2.0
"""Seconds before the remaining time is estimated."""

HASHED_BYTES = 2**22
"""Bytes per read while hashing."""

Item = TypeVar("Item")
Found = TypeVar("Found")


class Clock:
    """Progress and remaining time of work by several threads."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say, self._done, self._began = what, total, say, 0, time.monotonic()
        self._lock = threading.Lock()
        self.stopped = False

    def passed(self, num_bytes: int, name: str) -> None:
        """Count bytes as done. Raises CancelledError after another thread failed."""
        if self.stopped:
            raise CancelledError
        if not num_bytes:
            return
        with self._lock:
            self._done += num_bytes
            share = self._done / self._total
            passed = time.monotonic() - self._began
            left = passed * (1 / share - 1)
            # The first pieces wait for threads and disks, so they predict nothing.
            how_long = f", {left // 60:.0f}:{left % 60:02.0f} left" if passed > SETTLED_SECONDS else ""
            self._say(f"{self._what}: {share:.0%} of {size(self._total)}{how_long}, {name}")

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop the other threads at their next piece if the block raises, Ctrl-C included."""
        try:
            yield
        except BaseException:
            self.stopped = True
            raise

    def digest(self, file: Path, *, counted: bool = True) -> str:
        """Return the SHA-256 of a file in hexadecimal. With `counted`, its bytes count as progress."""
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while content := stream.read(HASHED_BYTES):
                digest.update(content)
                self.passed(len(content) if counted else 0, file.name)
        return digest.hexdigest()


def each(work: Callable[[Item], Found], items: Sequence[Item], clock: Clock) -> list[Found]:
    """Return `work` of every item, in order; an exception stops the other threads at their next piece.

    There is one thread per tensor: threads within a tensor would wait for each other at every operation, and the bits
    would depend on their number.
    """
    with threads_of_one(WORKERS) as pool, clock.stopping():
        return list(pool.map(work, items))
