"""Create matplotlib figures and save them as PNG. Imports matplotlib lazily and no torch.

The colors are Okabe and Ito's, distinguishable with color blindness.
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
    """Return a figure with `columns` panels side by side, sized in inches. Needs no display."""
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
    """Write a figure as PNG, the same bytes for the same figure."""
    # Leave out matplotlib's version, so that equal figures give equal files.
    figure.savefig(path, metadata={"Software": None})


def draw_bars(title: str, panels: Sequence[tuple[str, Mapping[str, float]]], path: Path) -> None:
    """Draw panels side by side, each a quantity with its unit and one bar per name."""
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
