"""Plot the change of spectra from spectrum.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.analysis.spectrum.report import SIDES
from distlora.output.figures import COLOURS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {"first": "-", "against": "--"}


def plot_spectrum(found: Mapping[str, Any], path: Path) -> None:
    """Singular values of dW, where it is, intruders by threshold, and where there are two runs their angles."""
    sides = [side for side in SIDES if side in found]
    figure, panels = new_figure(4 if len(sides) > 1 else 3, width=15 if len(sides) > 1 else 11.5, height=3.6)
    for side in sides:
        weights = [weight if side == "first" else weight["against"] for weight in found["weights"]]
        _plot_values(panels[0], weights, side)
        _plot_energy(panels[1], found[side], found["runs"][side]["name"], side)
        _plot_intruders(panels[2], weights, found["runs"][side]["name"], side)
    panels[0].set(xlabel="singular value of dW", ylabel="over the largest of W", yscale="log", xscale="log")
    if len(sides) > 1:
        first, against = (found["runs"][side]["name"] for side in sides)
        panels[0].set_title(f"{first} (lines), {against} (dashed)", fontsize=8)
    panels[0].legend(frameon=False, fontsize=7)
    panels[1].set(ylabel="||dW|| / ||W||, %")
    panels[1].set_ylim(bottom=0)
    panels[2].set(
        xlabel="threshold", ylabel=f"intruders among the first {found['top']}, %", xlim=(0, 1), ylim=(-2, 102)
    )
    for panel in panels[1:3]:
        panel.legend(frameon=False, fontsize=7)
    if len(sides) > 1:
        _plot_angles(panels[3], [weight for weight in found["weights"] if weight["angles"]])
    names = " against ".join(found["runs"][side]["name"] for side in sides)
    figure.suptitle(f"What {names} did to the singular values and vectors", fontsize=11)
    save(figure, path)


def _colour(linears: Sequence[str], linear: str) -> str:
    return COLOURS[list(linears).index(linear) % len(COLOURS)]


def _plot_values(panel: Axes, weights: Sequence[Mapping[str, Any]], side: str) -> None:
    """Plot one line per weight, coloured by its linear."""
    linears = list(dict.fromkeys(weight["linear"] for weight in weights))
    labelled = set()
    for weight in weights:
        top, values = weight["before"]["values"][:1], weight["delta"]["values"]
        if not top or not values:
            continue
        y = [value / top[0] for value in values if value > 1e-6 * values[0]]
        label = None if side != "first" or weight["linear"] in labelled else weight["linear"].rpartition(".")[2]
        labelled.add(weight["linear"])
        colour = _colour(linears, weight["linear"])
        panel.plot(range(1, len(y) + 1), y, STYLES[side], color=colour, linewidth=0.9, alpha=0.7, label=label)


def _plot_energy(panel: Axes, sums: Mapping[str, Any], name: str, side: str) -> None:
    """Plot one bar per linear."""
    linears = sums["linears"]
    shift = -0.2 if side == "first" else 0.2
    heights = [100 * (values["relative_norm"] or 0.0) for values in linears.values()]
    colour = COLOURS[0] if side == "first" else COLOURS[1]
    panel.bar([place + shift for place in range(len(linears))], heights, width=0.4, color=colour, label=name)
    panel.set_xticks(range(len(linears)), [linear.rpartition(".")[2] for linear in linears], rotation=60, fontsize=7)


def _plot_intruders(panel: Axes, weights: Sequence[Mapping[str, Any]], name: str, side: str) -> None:
    """Plot the share of vectors below every threshold; between the bounds where these differ."""
    pairs = [pair for weight in weights for pair in weight["intruders"]["cosines"]]
    grid = [step / 200 for step in range(201)]
    low, high = ([100 * sum(p[end] < t for p in pairs) / max(len(pairs), 1) for t in grid] for end in (1, 0))
    colour = COLOURS[0] if side == "first" else COLOURS[1]
    panel.plot(grid, low, STYLES[side], color=colour, label=name)
    panel.fill_between(grid, low, high, color=colour, alpha=0.25, linewidth=0)


def _plot_angles(panel: Axes, weights: Sequence[Mapping[str, Any]]) -> None:
    """Cosines of the principal angles of the output directions, and what random spaces would share."""
    linears = list(dict.fromkeys(weight["linear"] for weight in weights))
    for weight in weights:
        cosines, colour = weight["angles"]["left"]["cosines"], _colour(linears, weight["linear"])
        panel.plot(range(1, len(cosines) + 1), cosines, ".-", color=colour, linewidth=0.9, markersize=3, alpha=0.7)
    chance = [weight["angles"]["left"]["by_chance"] ** 0.5 for weight in weights]
    if chance:
        panel.axhspan(min(chance), max(chance), color=COLOURS[7], alpha=0.3, label="random spaces, mean")
        panel.legend(frameon=False, fontsize=7)
    panel.set(xlabel="principal angle", ylabel="cosine, output directions", ylim=(0, 1.02))
    panel.locator_params(axis="x", integer=True)
