"""Curves as SVG that keeps its line widths at any size of the page, with axes and labels in HTML around it.

The plot is stretched to its place (`preserveAspectRatio="none"`, strokes that do not scale), so labels keep the size of
text on a telephone and on a wall. A point is a line of length 0 with round ends. The page's script adds what a pointer
or the arrow keys show; without it everything is there but that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from distlora_launcher.report.markup import Html, data, tag
from distlora_launcher.report.scales import Kind, Scale, scale_of
from distlora_launcher.report.series import Series, thinned
from distlora_launcher.report.words import figure, tick

Style = Literal["line", "faint", "points", "line points", "muted"]
SIDE = 1000
"""Units of a plot, either way."""
PALETTE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    name: str
    series: Series
    colour: int = 0
    """Of the palette, from 0; it has a dash of its own, too."""
    style: Style = "line"
    trial: int | None = None
    """Whose it is, in a sweep: shown together with what else is that trial's."""
    is_named: bool = True
    """Whether the legend has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A value to compare with: what was planned, where clipping begins."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    title: str
    unit: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    kind: Kind = "number"
    is_wide: bool = False
    note: str | None = None
    x_name: str = "step"
    x_words: Sequence[str] = ()
    """What the places 0, 1, ... along the axis are, where they are no numbers of steps."""
    from_zero: bool = False
    reach: float = 1.5
    """How far a level may be from the values to be drawn, in spans of theirs: it takes their room."""


def charts_part(charts: Iterable[Chart]) -> Html:
    """Those that have a point, beside each other where there is room."""
    drawn = [found for chart in charts if (found := draw(chart))]
    return tag("div", drawn, cls="charts") if drawn else Html("")


def draw(chart: Chart) -> Html:
    """A figure; nothing where no line has a point."""
    lines = [line for line in chart.lines if len(line.series)]
    if not lines:
        return Html("")
    values = [value for line in lines for value in line.series.values]
    steps = [step for line in lines for step in line.series.steps]
    levels = _near(chart, [0.0, *values] if chart.from_zero else values)
    y = scale_of([*values, *(level.value for level in levels)], from_zero=chart.from_zero)
    x = Scale(min(steps), max(steps)) if max(steps) > min(steps) else Scale(min(steps) - 0.5, max(steps) + 0.5)
    shown = [(line, thinned(line.series)) for line in lines]
    y_ticks = y.ticks()
    marks: list[Html] = [_rule(y.place(value), "grid") for value in y_ticks]
    marks += [_rule(y.place(level.value), "level") for level in levels]
    marks += [_curve(line, series, x, y) for line, series in shown]
    said = "; ".join(_summary(line, chart) for line in lines[:4])
    plot = tag(
        "div",
        tag(
            "svg",
            marks,
            viewBox=f"0 0 {SIDE} {SIDE}",
            preserveAspectRatio="none",
            role="img",
            aria_label=f"{chart.title}. {said}",
        ),
        cls="plot",
        tabindex="0",
        aria_label=f"{chart.title}: left and right arrows read values",
        role="group",
    )
    names = [tick(value, _gap(y_ticks), chart.kind) for value in y_ticks]
    place = [_percent(y.place(value)) for value in y_ticks]
    frame = tag(
        "div",
        tag("div", [tag("span", n, style=f"bottom:{p}") for n, p in zip(names, place, strict=True)], cls="ys"),
        plot,
        tag("div", list(_x_labels(x, chart.x_words)), cls="xs"),
        tag("div", chart.x_name, cls="x-name"),
        cls="frame",
        style=f"--gutter:{max(5, *(len(name) + 1 for name in names))}ch",
    )
    caption = tag(
        "figcaption",
        tag("b", chart.title),
        tag("span", chart.unit + (", log scale" if y.is_log else ""), cls="unit"),
        tag("span", list(_legend(chart, lines)), cls="keys"),
    )
    note = None if chart.note is None else tag("p", chart.note, cls="note")
    read = data(_read(shown, x, y, chart))
    return tag("figure", caption, frame, note, read, cls="chart wide" if chart.is_wide else "chart")


def _near(chart: Chart, values: Sequence[float]) -> list[Level]:
    """The levels that may be drawn: one far from all values would flatten them."""
    low, high = min(values), max(values)
    room = chart.reach * (high - low) or abs(high)
    return [level for level in chart.levels if low - room <= level.value <= high + room]


def _rule(place: float, cls: str) -> Html:
    height = round(SIDE * (1 - place), 1)
    return tag("path", d=f"M0 {height}H{SIDE}", cls=cls)


def _curve(line: Line, series: Series, x: Scale, y: Scale) -> Html:
    points = [
        f"{SIDE * x.place(step):.1f} {SIDE * (1 - y.place(value)):.1f}"
        for step, value in zip(series.steps, series.values, strict=True)
    ]
    paths = []
    if line.style != "points" and len(points) > 1:
        paths.append(tag("path", d="M" + "L".join(points), cls="curve"))
    if "points" in line.style or len(points) == 1:
        paths.append(tag("path", d="".join(f"M{point}h0" for point in points), cls="dots"))
    cls = f"line c{line.colour % PALETTE} {line.style.split()[0]}"
    return tag("g", paths, cls=cls, data_trial=line.trial)


def _x_labels(x: Scale, words: Sequence[str]) -> Iterator[Html]:
    """Whole steps, at their places; the last is drawn to the left of its own."""
    ticks = range(len(words)) if words else [value for value in x.ticks(6) if value == int(value)]
    for value in ticks:
        place = x.place(value)
        edge = "first" if place < 0.04 else "last" if place > 0.96 else None
        name = words[int(value)] if words else f"{value:,.0f}"
        yield tag("span", name, style=f"left:{_percent(place)}", cls=edge)


def _percent(place: float) -> str:
    return f"{100 * place:.2f}%"


def _gap(ticks: Sequence[float]) -> float:
    return min((b - a for a, b in pairwise(ticks)), default=abs(ticks[0]) if ticks else 1.0) or 1.0


def _legend(chart: Chart, lines: Sequence[Line]) -> Iterator[Html]:
    named = [line for line in lines if line.is_named]
    if len(named) > 1 or chart.levels:
        for line in named:
            yield _key(line.name, f"line c{line.colour % PALETTE} {line.style.split()[0]}", "points" in line.style)
    for level in chart.levels:
        yield _key(f"{level.name} {figure(level.value, chart.kind)}", "level", False)


def _key(name: str, cls: str, has_points: bool) -> Html:
    path = "M12 5h0" if has_points else "M0 5H24"
    mark = tag("path", d=path, cls="dots" if has_points else "level" if cls == "level" else "curve")
    swatch = tag("svg", tag("g", mark, cls=cls), viewBox="0 0 24 10", cls="swatch", aria_hidden="true")
    return tag("span", swatch, name, cls="key")


def _summary(line: Line, chart: Chart) -> str:
    """A curve for who does not see it."""
    series = line.series
    step, lowest = series.lowest()
    first, last = figure(series.values[0], chart.kind), figure(series.values[-1], chart.kind)

    def at(place: float) -> str:
        return f"{chart.x_name} {chart.x_words[int(place)] if chart.x_words else f'{place:,.0f}'}"

    return (
        f"{line.name}: {first} at {at(series.steps[0])}, {last} at {at(series.steps[-1])}, lowest "
        f"{figure(lowest, chart.kind)} at {at(step)}"
    )


def _read(shown: Sequence[tuple[Line, Series]], x: Scale, y: Scale, chart: Chart) -> dict[str, Any]:
    """What the page's script reads values from."""
    return {
        "x": [x.low, x.high],
        "y": [y.low, y.high],
        "log": y.is_log,
        "kind": chart.kind,
        "name": chart.x_name,
        "words": list(chart.x_words),
        "lines": [
            {
                "name": line.name,
                "colour": line.colour % PALETTE,
                "trial": line.trial,
                "x": [int(step) for step in series.steps],
                "y": [float(f"{value:.5g}") for value in series.values],
            }
            for line, series in shown
        ],
    }
