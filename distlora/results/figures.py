"""Draw figures with matplotlib, which is imported lazily: as PNG files, and as inline SVG of a page.

The text of an SVG stays text, in the page's own colour, so that it reads in light and dark. The same values give the
same bytes.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from distlora.system.numbers import number, size

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")
"""Okabe and Ito's, distinguishable with color blindness, on white paper."""
PAGE_COLOURS = ("#2f7ed8", "#d9631e", "#17917d", "#a05ad0", "#c4317f", "#7a9a1c", "#9a7436", "#6c7a99")
"""Colours that read on a light and on a dark page."""
MAX_POINTS = 600
"""Points of a drawn curve: more than a screen has columns for it."""
_INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
Style = Literal[
    "line",
    "dashed",
    "faint",
    "muted",
    "line points",
    "dashed points",
    "dotted points",
    "points",
    "dots",
    "cross",
    "bars",
]
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 2.0},
    "dashed": {"linewidth": 1.2, "linestyle": "--"},
    "faint": {"linewidth": 0.9, "alpha": 0.45},
    "muted": {"linewidth": 1.0, "alpha": 0.35, "color": "#888888"},
    "line points": {"linewidth": 1.7, "marker": "o", "markersize": 4},
    "dashed points": {"linewidth": 1.7, "linestyle": "--", "marker": "s", "markersize": 4},
    "dotted points": {"linewidth": 1.2, "linestyle": (0, (1, 2)), "marker": "o", "markersize": 5},
    "points": {"linestyle": "none", "marker": "o", "markersize": 6},
    "dots": {"linestyle": "none", "marker": ".", "alpha": 0.7},
    "cross": {"linestyle": "none", "marker": "x"},
    "bars": {},
}
_MARGINS = (0.75, 0.5, 0.15, 0.1)
"""Room at the left, bottom, right and top of the axes of an SVG, in inches."""
_WIDE, _HALF, _THIRD = (11.0, 3.1), (5.4, 2.4), (4.3, 2.3)
"""Width and height of an SVG by its share of the page's width, in inches. A row has three where that leaves no gap
(the page's template)."""
_PANEL = (4.2, 3.6)
"""Width and height of one figure of a PNG, in inches."""
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Points, joined or not, or bars."""

    name: str = ""
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    """Index into the colours."""
    style: Style = "line"
    is_named: bool = True
    """True if the legend shows it."""
    upper: Sequence[float] = ()
    """Upper edge of a band that begins at y."""
    errors: Sequence[float] = ()
    """Half lengths of the error bars of bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Curves over steps or other numbers, with horizontal levels to compare with."""

    title: str
    unit: str = ""
    curves: Sequence[Curve]
    levels: Sequence[tuple[str, float | None]] = ()
    """(name, value) of what was planned, or of where clipping begins; None is not drawn."""
    kind: Literal["number", "bytes", "share"] = "number"
    is_wide: bool = False
    note: str | None = None
    x_name: str = "step"
    x_words: Sequence[str] = ()
    """Names of the places 0, 1, ... along the axis, instead of steps."""
    x_scale: Literal["whole", "linear", "log"] = "whole"
    y_scale: Literal["auto", "linear", "log"] = "auto"
    """auto: by logarithm if a few large values would leave the others no room."""
    from_zero: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnFigure:
    """A figure as SVG, for a template."""

    title: str
    unit: str
    svg: Markup
    summary: str
    """First, last and lowest value of the curves, for a reader who cannot see them."""
    note: str | None = None
    is_wide: bool = False
    narrow: Markup | None = None
    """A wide figure again for a narrow screen, on which its text would be too small."""


def draw(figures: Iterable[Figure]) -> list[DrawnFigure]:
    """Draw the figures that have a point as SVG."""
    shown = [figure for figure in figures if any(len(curve.x) for curve in figure.curves)]
    small = _HALF if sum(not figure.is_wide for figure in shown) % 3 else _THIRD
    return [
        DrawnFigure(
            title=figure.title,
            unit=", ".join(filter(None, [figure.unit, "log scale" if _is_log(figure) else ""])),
            svg=_svg(partial(_plot, figure=figure), *(_WIDE if figure.is_wide else small)),
            narrow=_svg(partial(_plot, figure=figure), *_THIRD) if figure.is_wide else None,
            summary="; ".join(_summary(curve, figure) for curve in figure.curves[:4] if len(curve.x)),
            note=figure.note,
            is_wide=figure.is_wide,
        )
        for figure in shown
    ]


def save_png(figures: Sequence[Figure], path: Path, *, title: str) -> None:
    """Write the figures side by side as PNG. Needs no display."""
    width, height = _PANEL

    def plot(canvas: Any) -> None:
        for place, figure in enumerate(figures, start=1):
            axes = canvas.add_subplot(1, len(figures), place)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.set_title(figure.title, fontsize=9)
            axes.set_ylabel(figure.unit)
            _plot(axes, figure, COLOURS, ink="black")
        canvas.suptitle(title, fontsize=10)

    _save(plot, path, width=width * len(figures) if len(figures) > 1 else 2 * width, height=height)


def _save(plot: Callable[[Any], None], path: Path, *, width: float, height: float) -> None:
    """Write what `plot` draws on a canvas of that size, in inches; the same bytes for the same values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    plot(canvas)
    canvas.savefig(path, metadata={"Software": None})  # Without matplotlib's version.


def _values(figure: Figure) -> list[float]:
    return [value for curve in figure.curves for value in (*curve.y, *curve.upper)]


def _is_log(figure: Figure) -> bool:
    values = _values(figure)
    if figure.y_scale != "auto" or not values:
        return figure.y_scale == "log"
    return min(values) > 1e-100 and max(values) > max(20 * median(values), 30 * min(values))


def _plot(axes: Axes, figure: Figure, colours: Sequence[str] = PAGE_COLOURS, *, ink: str = _INK) -> None:
    values = _values(figure) or [0.0]
    low, high = min([*values, 0.0] if figure.from_zero else values), max(values)
    room = 1.5 * (high - low) or abs(high)  # A level far away would flatten the curves.
    levels = [(name, at) for name, at in figure.levels if at is not None and low - room <= at <= high + room]
    for curve in figure.curves:
        _plot_curve(axes, curve, colours[curve.colour % len(colours)])
    for name, value in levels:
        label = f"{name} {_text(value, figure)}"
        axes.axhline(value, color=ink, linewidth=1, linestyle=(0, (5, 4)), alpha=0.6, label=label)
    is_log = _is_log(figure)
    if is_log:
        axes.set_yscale("log")
    elif figure.from_zero and min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: _text(value, figure))
    axes.yaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel(figure.x_name)
    _set_x(axes, figure)
    if sum(curve.is_named for curve in figure.curves) + len(levels) > 1:
        handles, names = axes.get_legend_handles_labels()
        texts = [visible(name) for name in names]
        axes.legend(handles, texts, loc="best", frameon=False, fontsize=8, labelcolor=ink)


def _plot_curve(axes: Axes, curve: Curve, colour: str) -> None:
    name = curve.name if curve.is_named else f"_{curve.name}"
    if curve.style == "bars":
        width = 0.8 if len(curve.x) and float(curve.x[0]).is_integer() else 0.4  # Two beside each other.
        axes.bar(curve.x, curve.y, width=width, color=colour, label=name, yerr=curve.errors or None, capsize=4)
        return
    if curve.upper:
        axes.fill_between(curve.x, curve.y, curve.upper, color=colour, alpha=0.25, linewidth=0)
    x, y = thinned(curve.x, curve.y)
    # A line through two points would read as a trend.
    style_name = "points" if curve.style.endswith(" points") and len(x) <= 2 else curve.style
    style = {"color": colour, "label": name} | _STYLES[style_name]
    if len(x) == 1 and "marker" not in style:
        style |= {"marker": "o", "markersize": 5}
    axes.plot(x, y, **style)


def _set_x(axes: Axes, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    if figure.x_words:
        turned: dict[str, Any] = {"rotation": 60, "fontsize": 7} if len(" ".join(figure.x_words)) > 60 else {}
        axes.set_xticks(range(len(figure.x_words)), [visible(word) for word in figure.x_words], **turned)
    elif figure.x_scale == "whole":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    else:
        axes.set_xscale(figure.x_scale)


def thinned(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> tuple[Sequence[float], Sequence[float]]:
    """Return at most `most` points: both ends, and the lowest and highest of each section, so no spike is lost."""
    count = len(x)
    if count <= most:
        return x, y
    kept = {0, count - 1}
    sections = most // 2 - 1
    for section in range(sections):
        inside = range(count * section // sections, count * (section + 1) // sections)
        kept |= {min(inside, key=y.__getitem__), max(inside, key=y.__getitem__)}
    indices = sorted(kept)
    return [x[index] for index in indices], [y[index] for index in indices]


def save_stacked_bars(
    rows: Mapping[str, Mapping[str, float]], limits: Mapping[str, float], path: Path, *, title: str, x_name: str
) -> None:
    """Write a PNG with a bar per row, of its values side by side, on a grey one as long as its limit.

    The sum stands behind each bar, in red if it is over the limit. Values of less than a thousandth are left out.
    """
    from matplotlib import colormaps

    widest = max(max(sum(values.values()), limits.get(name, 0.0)) for name, values in rows.items())
    names = list(dict.fromkeys(n for values in rows.values() for n, value in values.items() if value > widest / 1000))

    def plot(canvas: Any) -> None:
        axes = canvas.add_subplot(1, 1, 1)
        axes.spines[["top", "right"]].set_visible(False)
        for place, (row, values) in enumerate(rows.items()):
            total, limit = sum(values.values()), limits.get(row)
            if limit is not None:
                axes.barh(place, limit, height=0.8, color="#efefef", edgecolor="black")
            left = 0.0
            for name, colour in zip(names, itertools.cycle(colormaps["tab20"].colors), strict=False):  # type: ignore[attr-defined]
                value = values.get(name, 0.0)
                axes.barh(place, value, left=left, height=0.62, color=colour, label="" if place else name)
                if value > 0.045 * widest:
                    axes.text(left + value / 2, place, f"{value:.1f}", ha="center", va="center", fontsize=8)
                left += value
            is_over = limit is not None and total > limit
            text = f"{total:.1f}" + ("" if limit is None else f" of {limit:.1f}")
            end = max(total, limit or 0.0) + 0.012 * widest
            axes.text(end, place, text, va="center", color=COLOURS[1] if is_over else "black")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.17 * widest)
        axes.set_xlabel(x_name)
        axes.set_title(title, fontsize=10, wrap=True)
        canvas.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)

    _save(plot, path, width=11, height=2.7 + 0.52 * len(rows))


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number whose sums stay within a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e200


def as_text(value: Any) -> str:
    """Return a setting's value in full."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)
"""Control characters, lone surrogates, and marks that reverse the direction of the text after them."""


def visible(text: str) -> str:
    r"""Write out the characters of a text that cannot be seen, as in "\u202e"."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def _svg(plot: Callable[[Axes], None], width: float, height: float) -> Markup:
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


def _text(value: float, figure: Figure) -> str:
    if figure.kind == "bytes":
        return size(value)
    return f"{value:.1%}" if figure.kind == "share" else number(value)


def _summary(curve: Curve, figure: Figure) -> str:
    lowest = min(range(len(curve.x)), key=curve.y.__getitem__)

    def told(index: int) -> str:
        x = curve.x[index]
        place = f"{x:,.0f}" if figure.x_scale == "whole" else number(x)
        place = figure.x_words[int(x)] if figure.x_words else place
        return f"{_text(curve.y[index], figure)} at {figure.x_name} {place}"

    return f"{curve.name}: {told(0)}, {told(-1)}, lowest {told(lowest)}"
