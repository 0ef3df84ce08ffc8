"""Bytes on the wire, counted where the collectives are issued."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Traffic:
    """What this rank's collectives moved since the last `take`: bytes of gathered results, of reduced buffers, and of
    the whole gradients of which each rank kept the sum of its rows."""

    gathered_bytes: int = 0
    reduced_bytes: int = 0
    scattered_bytes: int = 0

    def take(self, num_steps: int = 1) -> Traffic:
        """The bytes so far, a step; starts again from zero."""
        counts = Traffic(
            self.gathered_bytes // num_steps, self.reduced_bytes // num_steps, self.scattered_bytes // num_steps
        )
        self.restore(Traffic())
        return counts

    def restore(self, counts: Traffic) -> None:
        """Go back to counts from before."""
        for name, count in asdict(counts).items():
            setattr(self, name, count)
