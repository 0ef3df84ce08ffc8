"""Figures by step: read from metrics.jsonl whatever state it is in, smoothed, and thinned out with their extremes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import parse_object

MOST_POINTS = 600
"""Of a drawn line: more than a screen has columns for it."""
SMOOTHED_FROM = 12
"""Values of which a mean says more than they do themselves."""
_OF_A_LINE = ("step", "time")
_BEYOND = 1e200


@dataclass(frozen=True, slots=True)
class Series:
    """Finite values, by rising steps."""

    steps: Sequence[float]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def is_constant(self) -> bool:
        return len(set(self.values)) <= 1

    def at(self, step: float) -> float | None:
        """The value of exactly this step."""
        index = bisect_left(self.steps, step)
        return self.values[index] if index < len(self) and self.steps[index] == step else None

    def lowest(self) -> tuple[float, float]:
        """(step, value) of the smallest."""
        index = min(range(len(self)), key=self.values.__getitem__)
        return self.steps[index], self.values[index]


@dataclass(slots=True)
class Metrics:
    """What RUN/metrics.jsonl says, as far as it can be read."""

    training: dict[str, Series] = field(default_factory=dict)
    """Figures of training steps, by name."""
    held_out: dict[str, Series] = field(default_factory=dict)
    """Figures of evaluations, by name; step 0 is before the first step."""
    non_finite: list[tuple[int, str]] = field(default_factory=list)
    """(step, figure) of what was NaN or infinite."""
    damaged: int = 0
    """Lines that are no record of a step."""
    step: int = 0
    """The last of them."""
    began: float | None = None
    ended: float | None = None
    """When the first and last line were written, in seconds since 1970."""


def read_metrics(path: Path) -> Metrics:
    """The figures of a run. Raises OSError where the file cannot be read; a line that is no record is counted."""
    found = Metrics()
    if not path.is_file():  # Reading a pipe would wait for a writer.
        return found
    points: dict[tuple[bool, str], dict[int, float]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        entry = _entry(line)
        if entry is None:
            # A run that goes on, or a kill, has cut off the last.
            found.damaged += bool(line.strip()) and number < len(lines) - 1
            continue
        step, is_held_out = entry["step"], "eval_loss" in entry
        found.step = max(found.step, step)
        if is_number(when := entry.get("time")):
            found.began = when if found.began is None else found.began
            found.ended = when
        for name, value in entry.items():
            if is_number(value) and name not in _OF_A_LINE:
                points.setdefault((is_held_out, name), {})[step] = float(value)
            elif value is None:
                found.non_finite.append((step, name))
    for (is_held_out, name), values in points.items():
        (found.held_out if is_held_out else found.training)[name] = series_of(values)
    return found


def series_of(values: Mapping[int, float]) -> Series:
    steps = sorted(values)
    return Series(steps, [values[step] for step in steps])


def smoothed(series: Series, window: int) -> Series:
    """The mean of the `window` values around each, as many on either side, so it lags behind nothing. Near the ends it
    is of fewer, and where these would be less than a quarter it is left out."""
    sums = [0.0, *accumulate(series.values)]
    half, count = window // 2, len(series)
    inside = range(half // 4, count - half // 4)
    means = []
    for index in inside:
        reach = min(half, index, count - 1 - index)
        means.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return Series([series.steps[index] for index in inside], means)


def window_of(series: Series) -> int:
    """Over how many values to smooth: a 16th of them, odd."""
    return max(5, len(series) // 16) | 1


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most so many points, with the first, the last, and of each part between the smallest and the largest: no spike
    is lost."""
    count = len(series)
    if count <= most:
        return series
    kept = {0, count - 1}
    parts = most // 2 - 1
    for part in range(parts):
        inside = range(count * part // parts, count * (part + 1) // parts)
        kept |= {min(inside, key=series.values.__getitem__), max(inside, key=series.values.__getitem__)}
    indices = sorted(kept)
    return Series([series.steps[index] for index in indices], [series.values[index] for index in indices])


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number, and none whose sums leave what a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _BEYOND


def _entry(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    try:
        entry = parse_object(line, "", "")
    except UserError:
        return None
    step = entry.get("step")
    return entry if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53 else None
