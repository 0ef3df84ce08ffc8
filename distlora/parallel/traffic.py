"""Bytes on the wire, counted where the collectives are issued."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(slots=True)
class Traffic:
    """What this rank's collectives moved since the last `take`: bytes of gathered results, of reduced buffers, and of
    the whole gradients of which each rank kept the sum of its rows."""

    gathered_bytes: int = 0
    reduced_bytes: int = 0
    scattered_bytes: int = 0
    between_copies_bytes: int = 0
    """Of all these, the ones in groups where ranks of several copies of the base meet (`Shards.crosses`)."""

    def take(self) -> Traffic:
        """The bytes so far; starts again from zero."""
        counts = replace(self)
        self.restore(Traffic())
        return counts

    def per_step(self, num_steps: int) -> Traffic:
        """A step's share of the bytes of so many."""
        return Traffic(**{name: count // num_steps for name, count in asdict(self).items()})

    def add(self, counts: Traffic) -> None:
        """What others counted, too."""
        for name, count in asdict(counts).items():
            setattr(self, name, getattr(self, name) + count)

    def restore(self, counts: Traffic) -> None:
        """Go back to counts from before."""
        for name, count in asdict(counts).items():
            setattr(self, name, count)
