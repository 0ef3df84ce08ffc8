"""`distlora bench methods`: held-out losses, drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distlora.output.figures import COLOURS, new_figure, save


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
