"""Bytes on the wire, counted where the collectives are issued."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """What this rank's collectives moved since the last reset: bytes of the gathered result, of the reduced buffer."""

    gathers: int = 0
    gathered_bytes: int = 0
    reductions: int = 0
    reduced_bytes: int = 0

    def add_gather(self, num_bytes: int) -> None:
        self.gathers += 1
        self.gathered_bytes += num_bytes

    def add_reduction(self, num_bytes: int) -> None:
        self.reductions += 1
        self.reduced_bytes += num_bytes

    def take(self) -> Traffic:
        """The counts so far; starts again from zero."""
        counts = Traffic(self.gathers, self.gathered_bytes, self.reductions, self.reduced_bytes)
        self.gathers = self.gathered_bytes = self.reductions = self.reduced_bytes = 0
        return counts
