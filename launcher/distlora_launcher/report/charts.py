"""Draw a report's charts as inline SVG with matplotlib: curves by step, and parallel coordinates of trials.

Text stays text, in the page's own colour, so that a chart reads in light and dark. The same values give the same SVG.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from distlora.system.numbers import number, size
from distlora_launcher.report.records import Series, is_number, thinned
from distlora_launcher.report.render import as_text, visible

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

COLOURS = ("#2f7ed8", "#d9631e", "#17917d", "#a05ad0", "#c4317f", "#7a9a1c", "#9a7436", "#6c7a99")
"""Colours that read on a light and on a dark page."""
_INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2.0},
    "faint": {"linewidth": 0.9, "alpha": 0.45},
    "muted": {"linewidth": 1.0, "alpha": 0.35, "color": "#888888"},
    "line points": {"linewidth": 1.7, "marker": "o", "markersize": 4},
    "dotted points": {"linewidth": 1.2, "linestyle": (0, (1, 2)), "marker": "o", "markersize": 5},
    "points": {"linestyle": "none", "marker": "o", "markersize": 6},
}
_MARGINS = (0.75, 0.5, 0.15, 0.1)
"""Room at the left, bottom, right and top of the axes, in inches."""
_WIDE, _HALF, _THIRD = (11.0, 3.1), (5.4, 2.4), (4.3, 2.3)
"""Width and height of a chart by its share of the page's width, in inches. A row has three where that leaves no gap
(templates/base.html.jinja)."""
_MAX_AXIS_VALUES = 7
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve."""

    name: str
    series: Series
    colour: int = 0
    """Index into COLOURS."""
    style: Literal["line", "faint", "muted", "line points", "dotted points", "points"] = "line"
    is_named: bool = True
    """True if the legend shows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Curves over the steps, with horizontal levels to compare with."""

    title: str
    unit: str = ""
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = ()
    """(name, value) of what was planned, or of where clipping begins."""
    kind: Literal["number", "bytes", "share"] = "number"
    is_wide: bool = False
    note: str | None = None
    x_name: str = "step"
    x_words: Sequence[str] = ()
    """Names of the places 0, 1, ... along the axis, instead of steps."""
    from_zero: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A drawn chart, for a template."""

    title: str
    unit: str
    svg: Markup
    summary: str
    """First, last and lowest value of the curves, for a reader who cannot see them."""
    note: str | None = None
    is_wide: bool = False
    narrow: Markup | None = None
    """A wide chart again for a narrow screen, on which its text would be too small."""


def draw(charts: Iterator[Chart] | Sequence[Chart]) -> list[Figure]:
    """Draw the charts that have a point."""
    drawn = [chart for chart in charts if any(len(line.series) for line in chart.lines)]
    small = sum(not chart.is_wide for chart in drawn)
    return [_draw(chart, _HALF if small % 3 else _THIRD) for chart in drawn]


def _draw(chart: Chart, small: tuple[float, float]) -> Figure:
    lines = [line for line in chart.lines if len(line.series)]
    values = [value for line in lines for value in line.series.values]
    low, high = min([*values, 0.0] if chart.from_zero else values), max(values)
    room = 1.5 * (high - low) or abs(high)  # A level far away would flatten the curves.
    levels = [(name, value) for name, value in chart.levels if low - room <= value <= high + room]

    # A few large values would leave the others no room on a linear axis.
    is_log = min(values) > 1e-100 and max(values) > max(20 * median(values), 30 * min(values))

    from matplotlib.ticker import MaxNLocator

    def plot(axes: Axes) -> None:
        for line in lines:
            series = thinned(line.series)
            # A line through two points would read as a trend.
            style_name = "points" if line.style.endswith(" points") and len(series) <= 2 else line.style
            style = {"color": COLOURS[line.colour % len(COLOURS)], "label": line.name} | _STYLES[style_name]
            if len(series) == 1:
                style |= {"marker": "o", "markersize": 5}
            (curve,) = axes.plot(series.steps, series.values, **style)
            if not line.is_named:
                curve.set_label(f"_{line.name}")
        for name, value in levels:
            axes.axhline(
                value,
                color=_INK,
                linewidth=1,
                linestyle=(0, (5, 4)),
                alpha=0.6,
                label=f"{name} {_figure(value, chart)}",
            )
        if is_log:
            axes.set_yscale("log")
        elif chart.from_zero and min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: _figure(value, chart))
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_xlabel(chart.x_name)
        if chart.x_words:
            axes.set_xticks(range(len(chart.x_words)), [visible(word) for word in chart.x_words])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if len(lines) + len(levels) > 1:
            handles, names = axes.get_legend_handles_labels()
            axes.legend(
                handles, [visible(name) for name in names], loc="best", frameon=False, fontsize=8, labelcolor=_INK
            )

    return Figure(
        title=chart.title,
        unit=", ".join(filter(None, [chart.unit, "log scale" if is_log else ""])),
        svg=_svg(plot, *(_WIDE if chart.is_wide else small)),
        narrow=_svg(plot, *_THIRD) if chart.is_wide else None,
        summary="; ".join(_summary(line, chart) for line in lines[:4]),
        note=chart.note,
        is_wide=chart.is_wide,
    )


def parallel_coordinates(names: Sequence[str], trials: Sequence[tuple[Sequence[Any], bool]]) -> Figure | None:
    """Draw an axis per name and a line per trial, given as (its values, whether it is the best).

    Only the last value of a trial may be None; its line ends before that. Returns None for fewer than two trials or
    axes.
    """
    if len(trials) < 2 or len(names) < 2:
        return None
    axes_values = [_axis([values[index] for values, _ in trials]) for index in range(len(names))]

    def plot(axes: Axes) -> None:
        for trial, (_, is_best) in sorted(enumerate(trials), key=lambda item: item[1][1]):
            places = [place for place in (axis[0][trial] for axis in axes_values) if place is not None]
            style = {"color": COLOURS[0], "linewidth": 2.4} if is_best else _STYLES["muted"]
            axes.plot(range(len(places)), places, **style)
        for index, (_, marks) in enumerate(axes_values):
            axes.axvline(index, color=_INK, linewidth=0.8, alpha=0.5)
            for place, word in marks:
                axes.text(index + 0.02, place, visible(word), fontsize=8, color=_INK, va="center")
        axes.set_xticks(range(len(names)), [visible(name) for name in names])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_xlim(-0.1, len(names) - 0.75)

    summary = f"Parallel coordinates of {len(trials)} trials over {', '.join(names)}"
    svg = _svg(plot, max(11.0, 1.9 * len(names)), 3.4)
    return Figure(title="", unit="", svg=svg, summary=summary, is_wide=True)


def _axis(values: Sequence[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Return the place of each value from 0 to 1, and (place, text) of the marks along the axis.

    Numbers are placed between the smallest and the largest, by logarithm where these are a factor of 8 apart; other
    values in the order in which they appear.
    """
    known = [value for value in values if value is not None]
    if known and all(is_number(value) for value in known):
        low, high = min(known), max(known)
        scale = math.log if low > 0 and high / low >= 8 else float
        span = scale(high) - scale(low) or 1.0

        def place(value: float) -> float:
            return (scale(value) - scale(low)) / span if high > low else 0.5

        distinct = sorted(set(known))
        step = max(1, -(-len(distinct) // _MAX_AXIS_VALUES))
        marks = [(place(value), number(value)) for value in dict.fromkeys([*distinct[::step], high])]
        return [None if value is None else place(value) for value in values], marks
    words = [None if value is None else as_text(value) for value in values]
    order = list(dict.fromkeys(word for word in words if word is not None))
    places = {word: index / (len(order) - 1) if len(order) > 1 else 0.5 for index, word in enumerate(order)}
    marks = [(where, word if len(word) <= 24 else f"{word[:22]}...") for word, where in places.items()]
    return [None if word is None else places[word] for word in words], marks[:40]


def _svg(plot: Any, width: float, height: float) -> Markup:
    """Return what `plot` draws on the axes of a figure of that size, in inches, as SVG for a page."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "distlora",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    file = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A glyph that the measuring font lacks: the browser has it.
        canvas = Canvas(figsize=(width, height), facecolor="none")
        # Fixed margins, and no `savefig`: a layout engine and `savefig` each draw everything once more.
        left, bottom, right, top = _MARGINS
        axes = canvas.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_INK, alpha=0.09)
        plot(axes)
        FigureCanvasSVG(canvas).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"', "", text).replace("xlink:href", "href")
    prefix = f"chart{next(_numbers)}-"  # Several charts of a page may not share an id.
    text = re.sub(r'\bid="|href="#|url\(#', lambda match: match[0] + prefix, text)
    return Markup(text)


def _figure(value: float, chart: Chart) -> str:
    if chart.kind == "bytes":
        return size(value)
    return f"{value:.1%}" if chart.kind == "share" else number(value)


def _summary(line: Line, chart: Chart) -> str:
    series = line.series
    step, lowest = series.lowest()

    def at(place: float) -> str:
        return f"{chart.x_name} {chart.x_words[int(place)] if chart.x_words else f'{place:,.0f}'}"

    first, last = _figure(series.values[0], chart), _figure(series.values[-1], chart)
    return (
        f"{line.name}: {first} at {at(series.steps[0])}, {last} at {at(series.steps[-1])}, lowest "
        f"{_figure(lowest, chart)} at {at(step)}"
    )
