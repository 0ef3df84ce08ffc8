"""The figures of what 4 bits cost, drawn from quantization.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.analysis.quantization.report import gain_db
from distlora.output.figures import COLOURS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT_COLOURS = {"bf16": COLOURS[6], "fp32": COLOURS[6], "nf4": COLOURS[0], "int4": COLOURS[1]}


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
    """Plot NF4's gain over int4 by kurtosis, beside known distributions."""
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
