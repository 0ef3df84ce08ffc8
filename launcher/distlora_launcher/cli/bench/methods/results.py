"""Turn finished runs into figures of each method, check step 0, and make the table, the sentences and the plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distlora.output.results import COLOURS, Table, new_figure, save
from distlora_launcher.cli.bench.methods.grid import METHODS, Method, Planned, best_rate, rates_of

Summaries = Mapping[Planned, Mapping[str, Any]]
"""Content of summary.json by finished run."""

BYTES_TRAINED = 16
"""Bytes per trained parameter: fp32 master, gradient and two optimizer states."""

SAME_ARITHMETIC = 1e-6
"""Largest relative difference of the base's held-out loss among runs on the same weights, before the first step."""


class BaseDiffersError(AssertionError):
    """Runs from one base have different losses before the first step: a method is wrong."""


def check_base(summaries: Summaries) -> dict[str, float]:
    """Return the base's held-out loss before the first step, for "unquantized" and "nf4".

    Raises BaseDiffersError, with both losses, for the run that differs most from the others.
    """
    agreed: dict[str, float] = {}
    for kind in ("unquantized", "nf4"):
        losses = {run: summary["base_eval_loss"] for run, summary in summaries.items() if base_of(run) == kind}
        if not losses:
            continue
        expected = agreed[kind] = statistics.median_low(losses.values())
        run = max(losses, key=lambda run: abs(losses[run] - expected))
        if not math.isclose(losses[run], expected, rel_tol=SAME_ARITHMETIC):
            raise BaseDiffersError(
                f"{run.folder} starts from a held-out loss of {losses[run]!r}, others on the {kind} base from "
                f"{expected!r}: {abs(losses[run] - expected) / expected:.1e} apart, and {SAME_ARITHMETIC:g} is what "
                "rounding explains"
            )
    return agreed


def base_of(run: Planned) -> str:
    """Return the kind of base of a run: unquantized or nf4."""
    return "nf4" if "quant=nf4" in run.method.settings else "unquantized"


def losses_of(summaries: Summaries, diverged: Collection[Planned]) -> dict[Planned, float]:
    """Return the held-out loss by run, infinity for diverged ones."""
    return {run: summary["eval_loss"] for run, summary in summaries.items()} | dict.fromkeys(diverged, math.inf)


def figures(
    summaries: Summaries, base_weights: int, quantizable: int, diverged: Collection[Planned] = ()
) -> list[dict[str, Any]]:
    """Return a row for each method with a finished run; the loss at a rate that diverged is None.

    `base_weights` counts the base's parameters, `quantizable` those that quant=nf4 quantizes.
    """
    losses = losses_of(summaries, diverged)
    return [
        _row(method, summaries, rates_of(method, losses), rate, base_weights, quantizable)
        for method in METHODS
        if (rate := best_rate(method, losses)) is not None
    ]


def _row(
    method: Method,
    summaries: Summaries,
    rates: Mapping[float, float],
    rate: float,
    base_weights: int,
    quantizable: int,
) -> dict[str, Any]:
    finished = {run: summary for run, summary in summaries.items() if run.method == method}
    chosen = [summary for run, summary in sorted(finished.items(), key=lambda item: item[0].seed) if run.rate == rate]
    losses = [summary["eval_loss"] for summary in chosen]
    first = chosen[0]
    return {
        "method": method.name,
        "trainable_parameters": first["trainable_parameters"],
        "eval_losses": losses,
        "eval_loss": statistics.mean(losses),
        "spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "base_eval_loss": first["base_eval_loss"],
        "rate": rate,
        "rates": {f"{tried:g}": loss if loss < math.inf else None for tried, loss in sorted(rates.items())},
        "rate_is_inside": min(rates) < rate < max(rates),
        "state_bytes": state_bytes(method, first, base_weights, quantizable),
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in chosen),
        "gathered_bytes_per_step": first.get("gathered_bytes_per_step", 0),
        # Whole gradients if all-reduced, shards if reduce-scattered.
        "gradient_bytes_per_step": first.get("reduced_bytes_per_step", 0) + first.get("scattered_bytes_per_step", 0),
        # Other work on the machine delayed the fastest run least.
        "seconds": min(summary["train_seconds"] for summary in finished.values()),
        "runs": len(finished),
    }


def state_bytes(method: Method, summary: Mapping[str, Any], base_weights: int, quantizable: int) -> int:
    """Return the bytes of weights, masters, gradients and optimizer states over all ranks, without activations.

    Full fine-tuning's weights are its masters.
    """
    trained = BYTES_TRAINED * summary["trainable_parameters"]
    if "adapter=full" in method.settings:
        return trained
    if "quant=nf4" in method.settings:
        return round(quantizable * summary["bits_per_parameter"] / 8) + 2 * (base_weights - quantizable) + trained
    return 2 * base_weights + trained


def table(rows: Sequence[Mapping[str, Any]], heading: str) -> Table:
    """Return the table; `*` marks a learning rate at an end of those tried."""
    head = ["method", "trained", "held-out loss", "gain", "lr", "state, MiB", "peak, MiB"]
    lines = [[*head, "gradients per step, KiB", "gathered per step, MiB", "seconds"]]
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        lines.append(
            [
                row["method"],
                f"{row['trainable_parameters']:,}",
                f"{row['eval_loss']:.3f}{spread}",
                f"{row['base_eval_loss'] - row['eval_loss']:.3f}",
                f"{row['rate']:g}{'' if row['rate_is_inside'] else '*'}",
                f"{row['state_bytes'] / 2**20:.1f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                f"{row['gradient_bytes_per_step'] / 2**10:,.0f}",
                f"{row['gathered_bytes_per_step'] / 2**20:.1f}",
                f"{row['seconds']:.1f}",
            ]
        )
    return Table(heading, lines)


PAIRS = (
    ("rsLoRA r=8", "LoRA r=8", "rank-stabilized scaling at rank 8"),
    ("rsLoRA r=64", "LoRA r=64", "rank-stabilized scaling at rank 64"),
    ("rsLoRA r=64", "rsLoRA r=8", "rank 64 in place of 8"),
    ("DoRA r=16", "rsLoRA r=16", "DoRA's magnitudes"),
    ("QLoRA r=16", "rsLoRA r=16", "a base in NF4"),
    ("rsLoRA r=16", "rsLoRA r=16 qv", "every linear in place of q and v"),
    ("rsLoRA r=16", "rsLoRA r=16 attention", "every linear in place of attention"),
    ("full", "rsLoRA r=16", "training everything in place of rsLoRA r=16"),
)
"""(method, method to compare with, cause of the difference)."""


def reading(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the effect of each change on the held-out loss, beside the noise between seeds."""
    by_name = {row["method"]: row for row in rows}
    for name, against, cause in PAIRS:
        if name in by_name and against in by_name:
            yield _compare(by_name[name], by_name[against], cause)


def divergences(rows: Sequence[Mapping[str, Any]], diverged: Collection[Planned]) -> Iterator[str]:
    """Yield a sentence for each run that diverged."""
    chosen = {row["method"]: row["rate"] for row in rows}
    for run in sorted(diverged, key=lambda run: (METHODS.index(run.method), run.rate, run.seed)):
        rest = "; its row has the other seeds" if chosen.get(run.method.name) == run.rate else ""
        yield f"{run.method.name}, lr {run.rate:g}, seed {run.seed} diverged{rest}"


def _compare(row: Mapping[str, Any], other: Mapping[str, Any], cause: str) -> str:
    """Compare by two of Welch's standard errors, a rule of thumb with three seeds."""
    difference = row["eval_loss"] - other["eval_loss"]
    text = f"{cause}: {difference:+.3f} nats"
    if row["spread"] is None or other["spread"] is None:
        return f"{text} (one seed)"
    error = math.sqrt(sum(r["spread"] ** 2 / len(r["eval_losses"]) for r in (row, other)))
    verdict = "more than the noise between seeds" if abs(difference) > 2 * error else "within the noise between seeds"
    return f"{text} ± {error:.3f}, {verdict}"


def plot_methods(rows: Sequence[Mapping[str, Any]], bases: Mapping[str, float], path: Path) -> None:
    """Plot the held-out loss of each method, a dot per seed, and over the learning rates."""
    figure, (by_method, by_rate) = new_figure(2, width=11, height=4.2)
    names = [row["method"] for row in rows]
    for index, row in enumerate(rows):
        colour = COLOURS[index % len(COLOURS)]
        by_method.plot(row["eval_losses"], [index] * len(row["eval_losses"]), ".", color=colour, alpha=0.6)
        by_method.plot([row["eval_loss"]], [index], "|", markersize=16, color=colour)
        rates = [float(rate) for rate in row["rates"]]
        style = "-" if index < len(COLOURS) else "--"
        losses = [math.nan if loss is None else loss for loss in row["rates"].values()]  # None if it diverged.
        by_rate.plot(rates, losses, f".{style}", color=colour, label=row["method"])
    by_method.set_yticks(range(len(names)), names)
    by_method.invert_yaxis()
    by_method.set(xlabel=f"held-out loss, nats per token (base: {bases.get('unquantized', bases.get('nf4')):.3f})")
    by_rate.set(xlabel="learning rate", ylabel="held-out loss", xscale="log")
    by_rate.legend(frameon=False, fontsize=7)
    save(figure, path)
