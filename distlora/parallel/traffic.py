"""Bytes on the wire, counted where the collectives are issued."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """What this rank's collectives moved since the last `take`: bytes of gathered results and of reduced buffers."""

    gathered_bytes: int = 0
    reduced_bytes: int = 0

    def take(self, num_steps: int = 1) -> Traffic:
        """The bytes so far, a step; starts again from zero."""
        counts = Traffic(self.gathered_bytes // num_steps, self.reduced_bytes // num_steps)
        self.gathered_bytes = self.reduced_bytes = 0
        return counts
