"""How far the losses of ways to train are from each other, beside how far they are by chance. Imports no torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.bench.step.cells import OURS, WAYS
from distlora.bench.step.compare import Measured
from distlora.output.figures import COLOURS, new_figure, save
from distlora.output.tables import Table

SEED_WAYS = (OURS, "peft-documented")
"""Trained from a second adapter too: what chance does."""
WINDOW = 10
"""Steps of a running mean in the plot."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of the losses of two curves, step by step."""

    first: Measured
    second: Measured

    @property
    def kind(self) -> str:
        if self.first.cell.way == self.second.cell.way:
            return "between seeds"
        ours = [curve.cell.way.startswith(OURS) for curve in (self.first, self.second)]
        if all(ours):
            return "between ours"
        return "ours and a peer" if any(ours) else "between peers"

    @property
    def by_step(self) -> list[float]:
        return [a - b for a, b in zip(self.first.losses, self.second.losses, strict=True)]

    @property
    def mean(self) -> float:
        """Of what one curve is above the other, where gaps of both signs cancel."""
        return statistics.fmean(self.by_step)

    @property
    def mean_size(self) -> float:
        return statistics.fmean(map(abs, self.by_step))

    @property
    def largest(self) -> float:
        return max(map(abs, self.by_step))


def differences(found: Sequence[Measured]) -> list[Difference]:
    """Of all pairs that began equal, and of each way's two seeds."""
    whole = [curve for curve in found if curve.failed is None]
    pairs = itertools.combinations(whole, 2)
    return [
        Difference(a, b)
        for a, b in pairs
        if a.cell.processes == b.cell.processes and (a.cell.way == b.cell.way or a.cell.seed == b.cell.seed == 0)
    ]


def reading(found: Sequence[Measured]) -> Iterator[str]:
    """Whether ours agrees with the peers, and by what measure."""
    for processes in sorted({curve.cell.processes for curve in found}):
        yield from _verdicts([curve for curve in found if curve.cell.processes == processes])
    if any(curve.cell.processes > 1 for curve in found):
        yield (
            "On several processes ours weighs a step's losses by their tokens, and the peers take the mean of the "
            "processes' means: packed rows have unequal counts of them, so the objectives differ there, too."
        )


def _verdicts(found: Sequence[Measured]) -> Iterator[str]:
    """Of curves on as many processes: beside what seeds do, and beside what the peers' recipes do."""
    by_kind: dict[str, list[Difference]] = {}
    for difference in differences(found):
        by_kind.setdefault(difference.kind, []).append(difference)
    beside = by_kind.get("ours and a peer", [])
    chance = {
        kind: max(each.mean_size for each in by_kind[kind])
        for kind in ("between seeds", "between peers")
        if kind in by_kind
    }
    if not beside or not chance:
        return
    furthest = max(beside, key=lambda each: each.mean_size)
    said = " and ".join(
        f"{'within' if furthest.mean_size <= size else 'NOT within'} what they differ {kind} ({size:.4f})"
        for kind, size in chance.items()
    )
    processes = furthest.first.cell.processes
    yield (
        f"The losses of ours and of a peer on {processes} process{'es' if processes > 1 else ''} differ by "
        f"{furthest.mean_size:.4f} a step in the mean of sizes at most ({title(furthest.first)} and "
        f"{title(furthest.second)}): {said}."
    )


def title(curve: Measured) -> str:
    cell = curve.cell
    extra = "" if cell.seed == 0 else f", another start (seed {cell.seed})"
    return f"{WAYS[cell.way].title}{extra}"


def tables(found: Sequence[Measured]) -> Iterator[Table]:
    last = min([10, *(len(curve.losses) for curve in found if curve.failed is None)])
    rows = [("", "processes", "first loss", f"mean of the last {last}", "what ran")]
    for curve in found:
        if curve.failed is None:
            losses = (f"{curve.losses[0]:.4f}", f"{statistics.fmean(curve.losses[-last:]):.4f}")
            rows.append((title(curve), str(curve.cell.processes), *losses, curve.ran))
        else:
            rows.append((title(curve), str(curve.cell.processes), "", "", f"failed: {curve.failed}"))
    yield Table("Losses", rows)
    rows = [("", "", "mean of sizes", "mean", "largest")]
    order = ("between seeds", "between peers", "ours and a peer", "between ours")
    for each in sorted(differences(found), key=lambda each: order.index(each.kind)):
        name = f"{title(each.first)} - {title(each.second)}"
        rows.append((name, each.kind, f"{each.mean_size:.4f}", f"{each.mean:+.4f}", f"{each.largest:.4f}"))
    yield Table("Differences of losses, step by step, in nats a token", rows)


def rows(found: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """The loss of each step, a row for each curve and step."""
    for curve in found:
        cell = curve.cell
        for step, loss in enumerate(curve.losses, 1):
            yield {"way": cell.way, "processes": cell.processes, "seed": cell.seed, "step": step, "loss": loss}


def draw(found: Sequence[Measured], path: Path) -> None:
    """The losses, and each way's beside ours."""
    whole = [curve for curve in found if curve.failed is None]
    figure, (above, beside) = new_figure(2, width=11, height=4.5)
    for number, curve in enumerate(whole):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": title(curve), "linewidth": 1.0}
        above.plot(range(1, len(curve.losses) + 1), curve.losses, **style)
        if curve is not whole[0]:
            gaps = _running([a - b for a, b in zip(curve.losses, whole[0].losses, strict=True)])
            beside.plot(range(WINDOW, WINDOW + len(gaps)), gaps, **style)
    above.set(xlabel="step", ylabel="loss, nats a token")
    if whole:
        beside.set(xlabel="step", ylabel=f"loss less that of {title(whole[0])}, mean of {WINDOW}")
        above.legend(fontsize=7)
    save(figure, path)


def _running(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[start : start + WINDOW]) for start in range(len(values) - WINDOW + 1)]
