"""Record the time and size of a save and a resume."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FLOOR = 12
"""Bytes per trained parameter that a resume needs: the parameter and two optimizer states in fp32."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall-clock and CPU seconds of the training thread."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Clock:
        """Read both clocks."""
        return cls(time.perf_counter(), time.thread_time())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Medians over the saves of one way, on rank 0."""

    way: str
    ranks: int
    r: int
    trained: int
    """Number of trained parameters."""
    nbytes: int
    """Bytes of its files."""
    save: Clock
    """Time of a save on the training thread."""
    on_disk: float
    """Seconds until the save is on disk; for peers, until it is in the page cache."""
    resume: Clock | None
    """Time from the files into an existing model; None if they cannot be read."""
    step: Clock | None = None
    """Time of a step without a save; ours only."""
    slower: float | None = None
    """Fraction of a step's CPU seconds that saves add; ours only."""
    fault: str | None = None
    """Reason why no run can resume from it."""

    @property
    def over_floor(self) -> float:
        """Bytes over those that a resume needs."""
        return self.nbytes / (FLOOR * self.trained)


def median(clocks: Sequence[Clock]) -> Clock:
    """Return the median of wall-clock and of CPU seconds, each for itself."""
    return Clock(
        statistics.median(clock.seconds for clock in clocks), statistics.median(clock.cpu_seconds for clock in clocks)
    )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
