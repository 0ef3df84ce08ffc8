"""Parallel coordinates: an axis for each setting that was searched, one for what is compared, a line for each trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distlora.system.numbers import number
from distlora_launcher.report.chart import SIDE
from distlora_launcher.report.markup import Html, tag
from distlora_launcher.report.run_records import as_text
from distlora_launcher.report.scales import Scale
from distlora_launcher.report.series import is_number

MOST_NAMED = 7
"""Values of an axis that are named each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """A trial."""

    trial: int
    values: Sequence[Any]
    """One for each axis; None where it has none, and its line ends before."""
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    name: str
    marks: Sequence[tuple[float, str]]
    """(place from 0 to 1, what is written there)."""
    places: Sequence[float | None]
    """Of each trial."""


def parallel(names: Sequence[str], trials: Sequence[Traced]) -> Html:
    """A figure; nothing of fewer than two trials, or of one axis."""
    if len(trials) < 2 or len(names) < 2:
        return Html("")
    axes = [_axis(name, [trial.values[index] for trial in trials]) for index, name in enumerate(names)]
    across = [SIDE * index / (len(axes) - 1) for index in range(len(axes))]
    order = sorted(range(len(trials)), key=lambda index: trials[index].is_best)  # The best is drawn over the others.
    lines = [_line(trials[index], [axis.places[index] for axis in axes], across) for index in order]
    rules = [tag("path", d=f"M{x:.1f} 0V{SIDE}", cls="axis") for x in across]
    labels = [_labels(axis, 100 * x / SIDE) for axis, x in zip(axes, across, strict=True)]
    said = f"Parallel coordinates of {len(trials)} trials over {', '.join(names)}; the table of trials has the values"
    svg = tag(
        "svg", rules, lines, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", role="img", aria_label=said
    )
    inner = tag("div", svg, labels, cls="coordinates", style=f"min-width:{130 * len(axes)}px")
    return tag("div", inner, cls="scroll")


def _axis(name: str, values: Sequence[Any]) -> Axis:
    """Numbers at their place between the smallest and the largest (on a log scale where they are factors apart), other
    values in the order in which they came first."""
    known = [value for value in values if value is not None]
    if known and all(is_number(value) for value in known):
        low, high = min(known), max(known)
        is_log = low > 0 and high / low >= 8
        scale = Scale(low, high, is_log) if high > low else Scale(low - 1, high + 1)
        distinct = sorted(set(known))
        named = distinct if len(distinct) <= MOST_NAMED else [low, *scale.ticks(4), high]
        marks = [(scale.place(value), number(value)) for value in named]
        return Axis(name, _apart(marks), [None if value is None else scale.place(value) for value in values])
    words = [None if value is None else as_text(value) for value in values]
    distinct_words = list(dict.fromkeys(word for word in words if word is not None))
    step = 1 / max(1, len(distinct_words) - 1)
    place = {word: index * step if len(distinct_words) > 1 else 0.5 for index, word in enumerate(distinct_words)}
    marks = [(where, word if len(word) <= 24 else word[:22] + "...") for word, where in place.items()]
    return Axis(name, _apart(marks), [None if word is None else place[word] for word in words])


def _apart(marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that do not lie on one that is named already; the first and last before others."""
    ends = [*marks[:1], *marks[-1:]]
    kept: list[tuple[float, str]] = []
    for mark in dict.fromkeys([*ends, *marks]):
        if all(abs(mark[0] - other[0]) > 0.055 for other in kept):
            kept.append(mark)
    return kept


def _line(trial: Traced, places: Sequence[float | None], across: Sequence[float]) -> Html:
    points = []
    for place, x in zip(places, across, strict=True):
        if place is None:
            break
        points.append(f"{x:.1f} {SIDE * (1 - place):.1f}")
    cls = "line c0 solid" if trial.is_best else "line muted"
    return tag(
        "g", tag("path", d="M" + "L".join(points), cls="curve") if points else None, cls=cls, data_trial=trial.trial
    )


def _labels(axis: Axis, left: float) -> list[Html]:
    edge = "first" if left == 0 else "last" if left == 100 else None
    marks = [
        tag("span", text, cls="mark", style=f"left:{left:.2f}%;bottom:{100 * place:.2f}%") for place, text in axis.marks
    ]
    return [tag("span", axis.name, cls=f"axis-name {edge or ''}".strip(), style=f"left:{left:.2f}%"), *marks]
