"""Draw plans: memory by category (`--plot`) and speed by number of GPUs (`--scaling --plot`). Imports no torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.output.figures import COLOURS, new_figure, save
from distlora.planner.speed.scaling import ScalingRow

_STYLES = {"one copy": "-o", "a copy a machine": "--s"}


def plot_scaling(rows: Sequence[ScalingRow], title: str, path: Path) -> None:
    """Draw a line for each fabric and each way to shard the base."""
    figure, (panel,) = new_figure(1, width=9, height=4.5)
    fabrics = list(dict.fromkeys(row.fabric for row in rows))
    for layout, fabric in dict.fromkeys((row.layout, row.fabric) for row in rows):
        own = [row for row in rows if (row.layout, row.fabric) == (layout, fabric)]
        panel.plot(
            [row.ranks for row in own],
            [row.tokens_of_a_rank for row in own],
            _STYLES[layout],
            color=COLOURS[fabrics.index(fabric) % len(COLOURS)],
            markersize=4,
            label=f"{layout}, {fabric}",
        )
    numbers = list(dict.fromkeys(row.ranks for row in rows))
    panel.set_xscale("log", base=2)
    panel.set_xticks(numbers, [f"{number:,}" for number in numbers])
    panel.set_ylim(bottom=0)
    panel.set(xlabel="GPUs", ylabel="tokens a second of a GPU")
    panel.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBar:
    """One plan's memory."""

    name: str
    kinds: Mapping[str, int]
    """Bytes by kind, in the order in which they are drawn."""
    usable: int | None
    """Bytes that there are; None: not known."""


KIND_COLOURS = {
    # The base in blues, what is trained in greens, what comes and goes in oranges, activations in purples.
    "codes": "#0072B2",
    "scales": "#4b9ccb",
    "weights": "#56B4E9",
    "embeddings": "#93cdee",
    "norms": "#c7e4f5",
    "resident": "#003f63",
    "adapters": "#009E73",
    "gradients": "#5cc4a5",
    "optimizer": "#a9dfcf",
    "scratch": "#f4cd73",
    "gathered": "#E69F00",
    "communication": "#b37b00",
    "kept": "#CC79A7",
    "working": "#e3b3cc",
    "logits": "#8f4f74",
    "slack": "#8c8c8c",
}
_DARK = ("codes", "resident", "adapters", "communication", "logits", "slack")
"""Kinds whose colour takes white words."""
_FREE = "#efefef"
_LABELLED = 0.045
"""Share of the panel's width from which a segment has its GB written in it."""


def plot_memory(bars: Sequence[MemoryBar], labels: Mapping[str, str], title: str, path: Path) -> None:
    """Draw a stacked bar per plan in GB (1e9 bytes) on the available memory, with its sum.

    `labels` names the categories.
    """
    figure, (panel,) = new_figure(1, width=11, height=2.7 + 0.52 * len(bars))
    widest = max(max(sum(bar.kinds.values()), bar.usable or 0) for bar in bars) / 1e9
    seen = widest * 1e9 / 1000
    kinds = [kind for kind in KIND_COLOURS if any(bar.kinds.get(kind, 0) > seen for bar in bars)]
    for row, bar in enumerate(bars):
        if bar.usable is not None:
            panel.barh(row, bar.usable / 1e9, height=0.8, color=_FREE)
        place = 0.0
        for kind in kinds:
            size = bar.kinds.get(kind, 0) / 1e9
            panel.barh(row, size, left=place, height=0.62, color=KIND_COLOURS[kind], edgecolor="white", linewidth=0.5)
            if size > _LABELLED * widest:
                colour = "white" if kind in _DARK else "black"
                panel.text(place + size / 2, row, f"{size:.1f}", ha="center", va="center", fontsize=8, color=colour)
            place += size
        _end_of_bar(panel, row, place, bar.usable, widest)
    panel.set_yticks(range(len(bars)), [bar.name for bar in bars])
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.set_xlim(0, 1.17 * widest)
    panel.set_axisbelow(True)
    panel.grid(axis="y", visible=False)
    panel.set(xlabel="GB of a rank's device at the peak of a step; grey: what there is")
    panel.set_title("\n".join(textwrap.wrap(title, 110)), fontsize=10)
    handles: list[Any] = [panel.barh([0], [0], color=KIND_COLOURS[kind]) for kind in kinds]
    names = [labels[kind] for kind in kinds]
    if len(bars) == 1:
        names = [f"{bars[0].kinds[kind] / 1e9:.2f}  {name}" for kind, name in zip(kinds, names, strict=True)]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)


def _end_of_bar(panel: Axes, row: int, total: float, usable: int | None, widest: float) -> None:
    """Write the sum of a bar, in red if it is too much, and mark the end of the GPU's memory."""
    there = math.inf if usable is None else usable / 1e9
    if usable is not None:
        panel.plot([there, there], [row - 0.4, row + 0.4], color="black", linewidth=2)
    end = total if usable is None else max(total, there)
    text = f"{total:.1f} GB" if usable is None else f"{total:.1f} of {there:.1f} GB"
    colour, weight = ("black", "normal") if total <= there else (COLOURS[1], "bold")
    panel.text(end + 0.012 * widest, row, text, va="center", fontsize=9, color=colour, weight=weight)
