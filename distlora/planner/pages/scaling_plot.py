"""Draw tokens per second per GPU over the number of GPUs (`distlora plan --scaling --plot`). Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
