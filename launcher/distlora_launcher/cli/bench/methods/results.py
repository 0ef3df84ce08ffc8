"""Finished runs to the figures of each method, the check of step 0, and the table. Plain values in, text out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from distlora.output.tables import Table
from distlora_launcher.cli.bench.methods.grid import (
    METHODS,
    Method,
    Planned,
    best_rate,
    rates_of,
)

Summaries = Mapping[Planned, Mapping[str, Any]]
"""summary.json of each finished run."""

BYTES_TRAINED = 16
"""Of each trained parameter: fp32 master, gradient and two moments."""

SAME_ARITHMETIC = 1e-6
"""How far the base's held-out loss may differ, relative, among runs on the same weights, whose arithmetic at step 0 is
the same: adapters add nothing, and full fine-tuning computes with its masters in the run's dtype."""


class BaseDiffersError(AssertionError):
    """Runs that start from one base do not have one loss before the first step: something is wrong with a method."""


def check_base(summaries: Summaries) -> dict[str, float]:
    """{"unquantized", "nf4"}: the base's held-out loss before the first step, which every run must agree on.

    Raises BaseDiffersError with the run that is furthest from the others and both losses.
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
    """Which base a run has: unquantized or nf4."""
    return "nf4" if "quant=nf4" in run.method.settings else "unquantized"


def losses_of(summaries: Summaries, diverged: Collection[Planned]) -> dict[Planned, float]:
    """What the search for learning rates goes by."""
    return {run: summary["eval_loss"] for run, summary in summaries.items()} | dict.fromkeys(diverged, math.inf)


def figures(
    summaries: Summaries, base_weights: int, quantizable: int, diverged: Collection[Planned] = ()
) -> list[dict[str, Any]]:
    """A row for each method that has a finished run. `base_weights` and `quantizable` are counts of the base's
    parameters: all, and those that quant=nf4 quantizes. The loss at a rate that diverged is None."""
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
    own = {run: summary for run, summary in summaries.items() if run.method == method}
    chosen = [summary for run, summary in sorted(own.items(), key=lambda item: item[0].seed) if run.rate == rate]
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
        # Gradients on the wire: whole where they are all-reduced, shards where they are reduce-scattered.
        "gradient_bytes_per_step": first.get("reduced_bytes_per_step", 0) + first.get("scattered_bytes_per_step", 0),
        # The fastest is the one that other work on the machine held up least.
        "seconds": min(summary["train_seconds"] for summary in own.values()),
        "runs": len(own),
    }


def state_bytes(method: Method, summary: Mapping[str, Any], base_weights: int, quantizable: int) -> int:
    """Weights, masters, gradients and moments, over all ranks, each counted once: what a method must keep.

    Full fine-tuning's weights are its masters. Activations are not in it: they are the same for all but for what a
    method adds.
    """
    trained = BYTES_TRAINED * summary["trainable_parameters"]
    if "adapter=full" in method.settings:
        return trained
    if "quant=nf4" in method.settings:
        return round(quantizable * summary["bits_per_parameter"] / 8) + 2 * (base_weights - quantizable) + trained
    return 2 * base_weights + trained


def table(rows: Sequence[Mapping[str, Any]], heading: str) -> Table:
    """The table of README and terminal; `*` marks a learning rate at the end of those that were tried."""
    head = ["method", "trained", "held-out loss", "gain", "lr", "state, MiB", "peak, MiB"]
    lines = [[*head, "gradients a step, KiB", "gathered a step, MiB", "seconds"]]
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
"""(method, what it is measured against, what the difference is due to)."""


def reading(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each change does to the held-out loss, and whether the seeds tell it from nothing."""
    by_name = {row["method"]: row for row in rows}
    for name, against, cause in PAIRS:
        if name in by_name and against in by_name:
            yield _compare(by_name[name], by_name[against], cause)


def divergences(rows: Sequence[Mapping[str, Any]], diverged: Collection[Planned]) -> Iterator[str]:
    """A sentence for each run that diverged: what a row does not show."""
    chosen = {row["method"]: row["rate"] for row in rows}
    for run in sorted(diverged, key=lambda run: (METHODS.index(run.method), run.rate, run.seed)):
        of = "; the row is of its other seeds" if chosen.get(run.method.name) == run.rate else ""
        yield f"{run.method.name}, lr {run.rate:g}, seed {run.seed} diverged{of}"


def _compare(row: Mapping[str, Any], other: Mapping[str, Any], cause: str) -> str:
    """Welch's standard error, and 2 of them as the border: with three seeds no more than a rule of thumb."""
    difference = row["eval_loss"] - other["eval_loss"]
    text = f"{cause}: {difference:+.3f} nats"
    if row["spread"] is None or other["spread"] is None:
        return f"{text} (one seed)"
    error = math.sqrt(sum(r["spread"] ** 2 / len(r["eval_losses"]) for r in (row, other)))
    verdict = "more than the seeds explain" if abs(difference) > 2 * error else "within the seeds' noise"
    return f"{text} ± {error:.3f}, {verdict}"
