"""The least dimension that reaches a fraction of full fine-tuning's gain: which trainings to do, and what they say.

Pure arithmetic over a function that trains; imports no torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

RATE_STEP = 3.0
"""Learning rates are the first one times powers of this."""
FARTHEST_RATE = 6
"""Powers that are tried at most."""
FACTOR = 4
"""Between dimensions, until one reaches the share and one does not."""


@dataclass(slots=True)
class Rates:
    """The best learning rate of each dimension, as a power of RATE_STEP.

    The first dimension is tried both ways until the loss rises. Others begin with the power of the nearest one and are
    tried one way, since fewer dimensions need larger steps: a rate that is worse than its neighbour may be missed.
    """

    loss_at: Callable[[int, int], float]
    """(dimension, power) -> held-out loss, inf where it is not finite."""
    best: dict[int, int] = field(default_factory=dict)

    def loss(self, dimension: int) -> float:
        """At the best power, which is then in `best`."""
        power, ways = 0, [1, -1]
        if self.best:
            nearest = min(self.best, key=lambda known: abs(math.log(known / dimension)))
            power, ways = self.best[nearest], [1] if dimension < nearest else [-1]
        lowest = self.loss_at(dimension, power)
        for way in ways:
            first = power
            while abs(power + way) <= FARTHEST_RATE and (loss := self.loss_at(dimension, power + way)) < lowest:
                power, lowest = power + way, loss
            if power != first:
                break
        self.best[dimension] = power
        return lowest


@dataclass(frozen=True, slots=True)
class Bracket:
    """The neighbouring dimensions between which the share is reached."""

    low: int | None
    """Does not reach the share; None: the least dimension does."""
    high: int | None
    """Reaches it; None: the largest one does not."""


def bracket(reaches: Callable[[int], bool], *, start: int, least: int, most: int, resolution: float) -> Bracket:
    """Two dimensions, less than a factor of `resolution` apart, between which the share is reached.

    Takes it that more dimensions reach more; where noise says otherwise, one of the crossings is found.
    """
    low = high = None
    dimension = min(max(start, least), most)
    while low is None or high is None:
        if reaches(dimension):
            high = dimension
            if dimension == least:
                return Bracket(None, high)
            dimension = max(least, dimension // FACTOR)
        else:
            low = dimension
            if dimension == most:
                return Bracket(low, None)
            dimension = min(most, dimension * FACTOR)
    while high / low > resolution and (middle := round(math.sqrt(low * high))) not in (low, high):
        if reaches(middle):
            high = middle
        else:
            low = middle
    return Bracket(low, high)


def settle(
    ends: Bracket, mean_share: Callable[[int], float], share: float, *, least: int, most: int, factor: float
) -> list[int]:
    """Move the ends out until their mean shares are on both sides of `share`, or the limits are reached.

    Returns every dimension whose mean was requested.
    """
    candidates = []
    high, low = ends.high, ends.low
    for outwards, limit, dimension in ((factor, most, high), (1 / factor, least, low)):
        while dimension is not None:
            candidates.append(dimension)
            if (mean_share(dimension) >= share) == (outwards > 1) or dimension == limit:
                break
            moved = max(round(dimension * outwards), dimension + 1) if outwards > 1 else int(dimension * outwards)
            dimension = min(max(moved, least), most)
    return candidates


def side(shares: Mapping[int, Sequence[float]], share: float) -> str:
    """Return `above` (the largest tried dimension) or `at most` (the least) if nothing crosses."""
    means = _pooled(shares)
    return "at most" if means[0] >= share else "above"


def crossing(shares: Mapping[int, Sequence[float]], share: float, *, shift: float = 0.0) -> float | None:
    """Return the dimension at which the mean shares, with `shift` added, cross `share`; None without a crossing.

    Shares are made rising by isotonic regression weighted by the number of trainings, and interpolated linearly in log
    d.
    """
    dimensions, means = sorted(shares), _pooled(shares, shift)
    for (low, below), (high, above) in zip(
        zip(dimensions, means, strict=True), zip(dimensions[1:], means[1:], strict=True), strict=False
    ):
        if below < share <= above:
            part = (share - below) / (above - below)
            return math.exp(math.log(low) + part * math.log(high / low))
    return None


def _pooled(shares: Mapping[int, Sequence[float]], shift: float = 0.0) -> list[float]:
    """Return the mean shares plus `shift` in the order of the dimensions, made rising."""
    groups = [shares[dimension] for dimension in sorted(shares)]
    return isotonic([sum(group) / len(group) + shift for group in groups], [len(group) for group in groups])


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the rising sequence nearest in weighted squares, by pooling neighbours that fall."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, of_a, in_a), (b, of_b, in_b) = pools[-2:]
            pools[-2:] = [((a * of_a + b * of_b) / (of_a + of_b), of_a + of_b, in_a + in_b)]
    return [value for value, _, count in pools for _ in range(count)]


def deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation between seeds, pooled over dimensions that have several; None without one."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return None
    means = [sum(group) / len(group) for group in several]
    squares = sum((value - mean) ** 2 for group, mean in zip(several, means, strict=True) for value in group)
    return math.sqrt(squares / sum(len(group) - 1 for group in several))
