"""The one home of matplotlib: a figure to draw on, and its PNG. Imports no torch, and matplotlib late.

Colours are Okabe and Ito's, which people tell apart whatever their eyes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")
DOTS_PER_INCH = 100


def new_figure(columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels side by side, in inches. No window system is asked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    # Without the version in it, so that the same figures make the same file.
    figure.savefig(path, metadata={"Software": None})


def draw_bars(title: str, panels: Sequence[tuple[str, Mapping[str, float]]], path: Path) -> None:
    """A picture of a benchmark: panels side by side, each what is measured, with its unit, and a bar for each name."""
    most = max(len(values) for _, values in panels)
    figure, axes = new_figure(len(panels), width=2 + 3.5 * len(panels), height=1.2 + 0.32 * most)
    for axis, (label, values) in zip(axes, panels, strict=True):
        places = range(len(values))
        colours = [COLOURS[place % len(COLOURS)] for place in places]
        bars = axis.barh(places, list(values.values()), color=colours, height=0.65)
        axis.bar_label(bars, fmt="{:,.4g}", padding=3, fontsize=8)
        axis.set_yticks(places, list(values) if axis is axes[0] or list(values) != list(panels[0][1]) else [])
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set(xlabel=label)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
