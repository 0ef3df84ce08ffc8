"""What a save and a resume took, whoever did it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FLOOR = 12
"""Bytes of a trained parameter that a run cannot go on without: itself and two moments, in fp32."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Of the thread that trains."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.thread_time())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A way to save, as rank 0 saw it: medians over saves."""

    way: str
    ranks: int
    r: int
    trained: int
    """Parameters."""
    nbytes: int
    """Of its files."""
    save: Clock
    """What a save takes of the training thread,"""
    on_disk: float
    """and until it is on the disk, in seconds; what others leave to the page cache counts as there."""
    resume: Clock | None
    """From the files into a model that is there; None: they could not be read again."""
    step: Clock | None = None
    """A step without a save; ours."""
    slower: float | None = None
    """Of a step's CPU seconds, what saves beside it add; ours."""
    fault: str | None = None
    """Why no run can go on from it."""

    @property
    def over_floor(self) -> float:
        return self.nbytes / (FLOOR * self.trained)


def median(clocks: Sequence[Clock]) -> Clock:
    """Of the clock and of CPU seconds, each alone."""
    return Clock(
        statistics.median(clock.seconds for clock in clocks), statistics.median(clock.cpu_seconds for clock in clocks)
    )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
