"""Axes: where a value lies between two ends, and which round values are named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Kind = Literal["number", "bytes", "share"]
"""How a value is written."""
_PADDING = 0.05


@dataclass(frozen=True, slots=True)
class Scale:
    """From `low` at 0 to `high` at 1."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within, at most about so many."""
        if self.is_log:
            return _log_ticks(self.low, self.high, most)
        step = nice_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def scale_of(values: Sequence[float], *, from_zero: bool = False) -> Scale:
    """With a little space at the ends; logarithmic where a few values would leave no room for the others."""
    low, high = min(values), max(values)
    if low > 1e-100 and high > 20 * median(values) and 30 * low < high < 1e30 * low:
        room = (high / low) ** _PADDING
        return Scale(low / room, high * room, is_log=True)
    if from_zero and low >= 0:
        return Scale(0.0, high * (1 + _PADDING) or 1.0)
    room = (high - low) * _PADDING or abs(high) * _PADDING or 1.0
    return Scale(low - room, high + room)


def nice_step(wanted: float) -> float:
    """1, 2 or 5 times a power of ten, at least as large as wanted."""
    if not 1e-300 < wanted < 1e300:
        return 1e-300 if wanted <= 1e-300 else wanted
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors = (1, 2, 5) if decades <= 2 else (1,)
    every = max(1, -(-decades // most))
    found = [10.0**power * factor for power in range(first, last + 1, every) for factor in factors]
    return [value for value in found if low <= value <= high]
