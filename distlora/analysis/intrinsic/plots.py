"""The figures of the intrinsic dimension, drawn from what the worker found. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.analysis.intrinsic.report import SCALING_WORDS, mean
from distlora.output.figures import COLOURS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {"none": "--", "layers": "-"}


def plot_intrinsic(found: Mapping[str, Any], path: Path) -> None:
    """Share of full fine-tuning's gain and the held-out loss itself, over the dimension."""
    figure, (shares, losses) = new_figure(2, width=11, height=4)
    for number, arm in enumerate(found["arms"]):
        colour, name = COLOURS[number % len(COLOURS)], f"{arm['model']}, {arm['start']}"
        losses.axhline(arm["full"], color=colour, linewidth=0.8, linestyle=":")
        for scaling, subspace in arm["subspaces"].items():
            label = f"{name}, {SCALING_WORDS[scaling]}"
            _draw(shares, subspace, "shares", colour, LINES[scaling], label)
            _draw(losses, subspace, "losses", colour, LINES[scaling], label)
            if subspace["dimension"] is not None:
                shares.plot([subspace["dimension"]], [found["settings"]["share"]], "D", color=colour, markersize=6)
    shares.axhline(found["settings"]["share"], color="black", linewidth=0.8)
    shares.set(xlabel="dimensions trained", ylabel="share of full fine-tuning's gain", ylim=(-0.1, 1.1))
    losses.set(xlabel="dimensions trained", ylabel="held-out loss, nats a token (dotted: full)")
    for panel in (shares, losses):
        panel.set_xscale("log")
    if any(arm["subspaces"] for arm in found["arms"]):
        shares.legend(frameon=False, fontsize=7)
    save(figure, path)


def _draw(panel: Axes, subspace: Mapping[str, Any], key: str, colour: str, line: str, label: str) -> None:
    """Means over seeds joined by a line, and each seed's dot."""
    points = [point for point in subspace["points"] if None not in point["losses"]]
    x = [point["dimension"] for point in points]
    panel.plot(x, [mean(point[key]) for point in points], line, color=colour, label=label)
    for point in points:
        panel.plot([point["dimension"]] * len(point[key]), point[key], ".", color=colour, alpha=0.7)
