"""The one home of matplotlib: figures out of plain values, written as PNG. Imports no torch, and matplotlib late.

Colours are Okabe and Ito's, which people tell apart whatever their eyes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.analysis.report import gain_db

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")
FORMAT_COLOURS = {"bf16": COLOURS[6], "fp32": COLOURS[6], "nf4": COLOURS[0], "int4": COLOURS[1]}
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


def plot_quantization(figures: Mapping[str, Any], path: Path) -> None:
    """Errors by layer, NF4's gain over int4 by the tensors' kurtosis, and perplexity where it was measured."""
    has_text = bool(figures["perplexity"])
    figure, panels = new_figure(4 if has_text else 2, width=13 if has_text else 8, height=3.4)
    _plot_layers(panels[0], figures["tensors"])
    _plot_gains(panels[1], figures["tensors"], figures["references"])
    if has_text:
        _plot_perplexity(panels[2], panels[3], figures["perplexity"]["formats"])
    figure.suptitle(f"What 4 bits cost {figures['model_name']}", fontsize=11)
    save(figure, path)


def _plot_layers(panel: Axes, tensors: list[Mapping[str, Any]]) -> None:
    """Every tensor's relative error over its layer: a dot each, and the range of each layer."""
    for name, shift in (("nf4", -0.12), ("int4", 0.12)):
        x = [tensor["layer"] + shift for tensor in tensors]
        y = [100 * tensor["formats"][name]["relative_error"] for tensor in tensors]
        panel.plot(x, y, ".", color=FORMAT_COLOURS[name], alpha=0.7, label=name.replace("nf4", "NF4"))
    panel.set(xlabel="layer", ylabel="relative error of a tensor, %")
    panel.locator_params(axis="x", integer=True)
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)


def _plot_gains(panel: Axes, tensors: list[Mapping[str, Any]], references: Mapping[str, Any]) -> None:
    """Where NF4 wins: above the line. The distributions are what the tensors would be if they were drawn from one."""
    linears = list(dict.fromkeys(tensor["linear"] for tensor in tensors))
    for index, linear in enumerate(linears):
        points = [(t["excess_kurtosis"], gain_db(t)) for t in tensors if t["linear"] == linear]
        x = [kurtosis for kurtosis, gain in points if gain is not None]
        y = [gain for _, gain in points if gain is not None]
        panel.plot(x, y, ".", color=COLOURS[index % len(COLOURS)], label=linear.rpartition(".")[2])
    for name, values in references.items():
        kurtosis, gain = values["excess_kurtosis"], gain_db(values) or 0.0
        panel.plot([kurtosis], [gain], "x", color="black")
        panel.annotate(name, (kurtosis, gain), textcoords="offset points", xytext=(5, -11), fontsize=8)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xlabel="excess kurtosis of the tensor", ylabel="NF4 over int4, dB")
    if max((tensor["excess_kurtosis"] or 0) for tensor in tensors) > 8:
        # Else a few heavy-tailed tensors press the others together.
        panel.set_xscale("symlog", linthresh=4)
        panel.set_xticks([-1, 0, 2, 4, 10, 100, 1000], ["-1", "0", "2", "4", "10", "100", "1000"])
    else:
        panel.set_xlim(-1.6, 4.2)
    panel.legend(frameon=False, fontsize=7, ncols=2)


def _plot_perplexity(points: Axes, divergence: Axes, formats: Mapping[str, Any]) -> None:
    """Points over the dense model's, with their standard errors; and how far the predictions are from its own."""
    dense = next(iter(formats))
    names = [name for name in formats if name != dense]
    errors = [formats[name]["points_standard_error"] or 0.0 for name in names]
    values = [formats[name]["points"] for name in names]
    colours = [FORMAT_COLOURS[name] for name in names]
    points.bar(range(len(names)), values, yerr=errors, capsize=4, color=colours, width=0.6)
    points.set(ylabel=f"perplexity over {dense}'s {formats[dense]['perplexity']:,.2f}")
    divergences = [1000 * formats[name]["divergence"] for name in names]
    divergence.bar(range(len(names)), divergences, color=colours, width=0.6)
    divergence.set(ylabel=f"KL from {dense}'s predictions, millinats")
    for panel in (points, divergence):
        panel.set_xticks(range(len(names)), [name.replace("nf4", "NF4") for name in names])
        panel.axhline(0, color="black", linewidth=0.8)


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
    """A stacked bar of each plan in GB (1e9 bytes) on a grey one of what its card has, and its sum beside it; `labels`
    says what kinds are called."""
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
    """What it comes to, in red where that is too much; and a line where the card ends."""
    there = math.inf if usable is None else usable / 1e9
    if usable is not None:
        panel.plot([there, there], [row - 0.4, row + 0.4], color="black", linewidth=2)
    end = total if usable is None else max(total, there)
    text = f"{total:.1f} GB" if usable is None else f"{total:.1f} of {there:.1f} GB"
    colour, weight = ("black", "normal") if total <= there else (COLOURS[1], "bold")
    panel.text(end + 0.012 * widest, row, text, va="center", fontsize=9, color=colour, weight=weight)


def plot_methods(rows: Sequence[Mapping[str, Any]], bases: Mapping[str, float], path: Path) -> None:
    """Held-out loss of each method, every seed a dot; and over the learning rates that were tried."""
    figure, (by_method, by_rate) = new_figure(2, width=11, height=4.2)
    names = [row["method"] for row in rows]
    for index, row in enumerate(rows):
        colour = COLOURS[index % len(COLOURS)]
        by_method.plot(row["eval_losses"], [index] * len(row["eval_losses"]), ".", color=colour, alpha=0.6)
        by_method.plot([row["eval_loss"]], [index], "|", markersize=16, color=colour)
        rates = [float(rate) for rate in row["rates"]]
        style = "-" if index < len(COLOURS) else "--"
        losses = [math.nan if loss is None else loss for loss in row["rates"].values()]  # None where it diverged.
        by_rate.plot(rates, losses, f".{style}", color=colour, label=row["method"])
    by_method.set_yticks(range(len(names)), names)
    by_method.invert_yaxis()
    by_method.set(xlabel=f"held-out loss, nats a token (base: {bases.get('unquantized', bases.get('nf4')):.3f})")
    by_rate.set(xlabel="learning rate", ylabel="held-out loss", xscale="log")
    by_rate.legend(frameon=False, fontsize=7)
    save(figure, path)
