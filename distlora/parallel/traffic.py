"""Count bytes of network traffic where the collectives are issued."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(slots=True)
class Traffic:
    """Bytes of this rank's collectives since the last `take`: gathered results, reduced buffers, scattered gradients.

    Scattered bytes count the whole gradients of which each rank keeps the sum of its rows.
    """

    gathered_bytes: int = 0
    reduced_bytes: int = 0
    scattered_bytes: int = 0
    between_copies_bytes: int = 0
    """Bytes of all these in groups with ranks of several copies of the base (`Shards.crosses`)."""

    def take(self) -> Traffic:
        """Return the counts and reset them to zero."""
        counts = replace(self)
        self.restore(Traffic())
        return counts

    def per_step(self, num_steps: int) -> Traffic:
        """Return the counts of one of `num_steps` steps."""
        return Traffic(**{name: count // num_steps for name, count in asdict(self).items()})

    def add(self, counts: Traffic) -> None:
        """Add other counts."""
        for name, count in asdict(counts).items():
            setattr(self, name, getattr(self, name) + count)

    def restore(self, counts: Traffic) -> None:
        """Reset to earlier counts."""
        for name, count in asdict(counts).items():
            setattr(self, name, count)
