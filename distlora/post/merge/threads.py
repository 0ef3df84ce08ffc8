"""Several tensors at once, and how far they are."""

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
from distlora_kernels.threads import threads_of_one

Say = Callable[[str], None]
"""Called often; it says something now and then."""
WORKERS = min(4, len(os.sched_getaffinity(0)))
"""Tensors at once; each has a few pieces of 4 MiB in memory."""

SETTLED_SECONDS = 2.0
"""Before it is said how long the rest takes."""

HASHED_BYTES = 2**22
"""Of a file, at once."""

Item = TypeVar("Item")
Found = TypeVar("Found")


class Clock:
    """How far it is, and how long it will take. Every thread passes here with each piece."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say, self._done, self._began = what, total, say, 0, time.monotonic()
        self._lock = threading.Lock()
        self.stopped = False

    def passed(self, num_bytes: int, name: str) -> None:
        """Raises CancelledError once it is stopped."""
        if self.stopped:
            raise CancelledError
        if not num_bytes:
            return
        with self._lock:
            self._done += num_bytes
            share = self._done / self._total
            passed = time.monotonic() - self._began
            left = passed * (1 / share - 1)
            # The first pieces wait for threads and disks: what they took says nothing of the rest.
            how_long = f", {left // 60:.0f}:{left % 60:02.0f} left" if passed > SETTLED_SECONDS else ""
            self._say(f"{self._what}: {share:.0%} of {size(self._total)}{how_long}, {name}")

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """What the block raises, Ctrl-C too, stops the other threads at their next piece."""
        try:
            yield
        except BaseException:
            self.stopped = True
            raise

    def digest(self, file: Path, *, counted: bool = True) -> str:
        """SHA-256 of a file, in hexadecimal; it can be stopped. `counted`: its bytes are among the total's."""
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while content := stream.read(HASHED_BYTES):
                digest.update(content)
                self.passed(len(content) if counted else 0, file.name)
        return digest.hexdigest()


def each(work: Callable[[Item], Found], items: Sequence[Item], clock: Clock) -> list[Found]:
    """`work` of every item, in their order. What one raises stops the others at their next piece.

    A thread a tensor, and not threads within one: those wait for each other at every operation, and the bits would
    depend on their number.
    """
    with threads_of_one(WORKERS) as pool, clock.stopping():
        return list(pool.map(work, items))
