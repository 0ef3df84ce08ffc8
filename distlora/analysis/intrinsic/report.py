"""Show the figures of an analysis as tables, Markdown and a plot. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.analysis.intrinsic.request import PLOT_NAME
from distlora.results.tables import COLOURS, Table, as_markdown, as_text, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALING_WORDS = {"none": "no scaling (DID)", "layers": "layers scaled (SAID)"}


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """All of them, the most important first."""
    yield _dimensions(found)
    for arm in found["arms"]:
        for scaling, subspace in arm["subspaces"].items():
            yield _points(f"{arm['model']}, {arm['start']}, {SCALING_WORDS[scaling]}", subspace)


def _dimensions(found: Mapping[str, Any]) -> Table:
    name = f"d{100 * found['settings']['share']:.0f}"
    rows = [["model", "start", "parameters", "untrained", "full", "gain", "subspace", name, "range", "of all"]]
    for arm in found["arms"]:
        full = f"{arm['full']:.3f}" + ("" if arm["full_noise"] is None else f" ± {arm['full_noise']:.3f}")
        cells = [arm["model"], arm["start"], f"{arm['parameters']:,}", f"{arm['untrained']:.3f}", full]
        cells.append(f"{arm['untrained'] - arm['full']:.3f}")
        for scaling, subspace in arm["subspaces"].items():
            value = subspace["dimension"]
            part = "" if value is None else f"{value / arm['parameters']:.3%}"
            rows.append([*cells, SCALING_WORDS[scaling], dimension(subspace), _range(subspace), part])
        if not arm["subspaces"]:
            rows.append([*cells, "-", "-", "-", "-"])
    return Table(
        "Held-out loss in nats per token, and the dimension that reaches the fraction of full fine-tuning's gain", rows
    )


def dimension(subspace: Mapping[str, Any]) -> str:
    """`1,234`; `at most 5`, `above 16,384`: the least and the largest that were tried."""
    if subspace["dimension"] is not None:
        return f"{subspace['dimension']:,.0f}"
    tried = [point["dimension"] for point in subspace["points"]]
    return f"{subspace['side']} {(min if subspace['side'] == 'at most' else max)(tried):,}"


def _range(subspace: Mapping[str, Any]) -> str:
    if subspace["range"] is None:
        return "-"
    low, high = (None if value is None else f"{value:,.0f}" for value in subspace["range"])
    tried = [point["dimension"] for point in subspace["points"]]
    return f"{low or f'below {min(tried):,}'} to {high or f'above {max(tried):,}'}"


def _points(heading: str, subspace: Mapping[str, Any]) -> Table:
    rows = [["dimensions", "lr", "held-out loss", "share of the gain", "seeds", "moved"]]
    for point in subspace["points"]:
        rows.append(
            [
                f"{point['dimension']:,}",
                f"{point['lr']:g}",
                "not finite" if None in point["losses"] else f"{mean(point['losses']):.4f}",
                f"{mean(point['shares']):.1%}",
                f"{len(point['losses'])}",
                f"{point['distance']:.1%}",
            ]
        )
    return Table(heading, rows)


def reading(found: Mapping[str, Any]) -> list[str]:
    """Return what a range means, where trainings have several seeds."""
    noises = [s["noise"] for arm in found["arms"] for s in arm["subspaces"].values() if s["noise"] is not None]
    if not noises:
        return []
    return [
        f"Between seeds (of the subspace, the order of the rows, and random weights) the share differs by a standard "
        f"deviation of {min(noises):.1%} to {max(noises):.1%}; a range is where the share crosses with one of it, that "
        "of a single training, added or taken away."
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """report.md."""
    settings = found["settings"]
    held_out = found["eval_data"] or f"a tenth of {found['data']}"
    if found["arms"]:
        held_out += f" ({found['arms'][0]['held_out_rows']} rows, {found['arms'][0]['held_out_targets']:,} tokens)"
    return as_markdown(
        "How many dimensions fine-tuning needs",
        f"`distlora analyze intrinsic` on {found['data']}, held out {held_out}; {settings['steps']} steps of "
        f"{settings['batch']} rows of {settings['sequence_length']} tokens; {found['date']}, torch "
        f"{found['versions']['torch']}, {found['device']}.",
        reading(found),
        ("fraction of the gain and held-out loss by dimension", PLOT_NAME),
        tables(found),
        NOTES,
    )


NOTES = """**What is measured.** theta = theta_0 + P u over all parameters, u of d numbers and P a random subspace with
orthonormal columns; SAID multiplies each layer's part by a factor that is trained too, and counts it. Loss after the
last step; the gain is the untrained model's loss less that of full fine-tuning at its own best learning rate. Learning
rates are powers of 3 apart, the best of those that were tried at each dimension. "moved" is
||theta - theta_0|| / ||theta_0||."""


def terminal(found: Mapping[str, Any]) -> str:
    """Return the tables and conclusions for the terminal."""
    return as_text(tables(found), reading(found))


_LINES = {"none": "--", "layers": "-"}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Share of full fine-tuning's gain and the held-out loss itself, over the dimension."""
    figure, (shares, losses) = new_figure(2, width=11, height=4)
    for number, arm in enumerate(found["arms"]):
        colour, name = COLOURS[number % len(COLOURS)], f"{arm['model']}, {arm['start']}"
        losses.axhline(arm["full"], color=colour, linewidth=0.8, linestyle=":")
        for scaling, subspace in arm["subspaces"].items():
            label = f"{name}, {SCALING_WORDS[scaling]}"
            _plot(shares, subspace, "shares", colour, _LINES[scaling], label)
            _plot(losses, subspace, "losses", colour, _LINES[scaling], label)
            if subspace["dimension"] is not None:
                shares.plot([subspace["dimension"]], [found["settings"]["share"]], "D", color=colour, markersize=6)
    shares.axhline(found["settings"]["share"], color="black", linewidth=0.8)
    shares.set(xlabel="dimensions trained", ylabel="fraction of full fine-tuning's gain", ylim=(-0.1, 1.1))
    losses.set(xlabel="dimensions trained", ylabel="held-out loss, nats per token (dotted: full)")
    for panel in (shares, losses):
        panel.set_xscale("log")
    if any(arm["subspaces"] for arm in found["arms"]):
        shares.legend(frameon=False, fontsize=7)
    save(figure, path)


def _plot(panel: Axes, subspace: Mapping[str, Any], key: str, colour: str, line: str, label: str) -> None:
    """Means over seeds joined by a line, and each seed's dot."""
    points = [point for point in subspace["points"] if None not in point["losses"]]
    x = [point["dimension"] for point in points]
    panel.plot(x, [mean(point[key]) for point in points], line, color=colour, label=label)
    for point in points:
        panel.plot([point["dimension"]] * len(point[key]), point[key], ".", color=colour, alpha=0.7)
