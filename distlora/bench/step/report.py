"""Make the tables, sentences and plots of `distlora bench step`, of steps and of loss curves. Imports no torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.bench.step.cells import OURS, WAYS
from distlora.bench.step.compare import Measured
from distlora.output.figures import COLOURS, new_figure, save
from distlora.output.tables import Table, spread

MIB, MB = 2**20, 10**6
REFERENCES = (OURS, "ours-compiled")
"""Ways of ours that the peers are compared with."""
HOW = (
    "ratios compare turns of the same round; memory is the peak anonymous memory of a process in its steps over that "
    "after its imports (on a GPU the peak that torch allocated); ours runs in the environment that the launcher sets "
    "for workers (on a CPU malloc keeps freed pages and waiting threads sleep), the peers in the user's, with as many "
    "threads"
)
"""Method of the measurement, printed below the tables."""
AGREE = 0.02
"""Largest difference, in nats, of the first losses of bf16 models that start equal."""


def tokens_per_second(measured: Measured) -> float:
    """Return the median over the measured steps."""
    return measured.cell.tokens / statistics.median(measured.seconds())


def ratios(reference: Measured, other: Measured) -> list[float]:
    """Return the speed of the reference over the other's, by round."""
    return [sum(theirs.seconds) / sum(ours.seconds) for ours, theirs in zip(reference.turns, other.turns, strict=False)]


def memory_ratio(reference: Measured, other: Measured) -> float:
    """Return the reference's memory over the other's."""
    return reference.over_imports / max(1, other.over_imports)


def whole(group: Sequence[Measured]) -> list[Measured]:
    """Return the cells that completed all their turns."""
    return [each for each in group if each.turns and each.failed is None]


def table(group: Sequence[Measured]) -> Table:
    """Return the table of one problem."""
    references = [each for each in whole(group) if each.cell.way in REFERENCES]
    several = group[0].cell.processes > 1
    head = ["", "tokens/s", "best", "CPU s per step", "memory, MiB", "with imports", "losses"]
    for reference in references:
        head += [f"{reference.cell.way}: times as fast", "memory"]
    head += ["moved, MB", "over the network, MB"] if several else []
    rows: list[Sequence[str]] = [(*head, "what ran")]
    for each in group:
        if not each.turns:
            rows.append((each.cell.title, *[""] * (len(head) - 1), f"failed: {each.failed}"))
            continue
        cpu = statistics.median(second for turn in each.turns for second in turn.cpu_seconds)
        best = each.cell.tokens / min(each.seconds())
        cells = [each.cell.title, f"{tokens_per_second(each):,.0f}", f"{best:,.0f}", f"{cpu:.2f}"]
        cells += [f"{each.over_imports / MIB:,.0f}", f"{each.peak / MIB:,.0f}"]
        cells += [f"{each.losses[0]:.4f} -> {each.losses[-1]:.4f}"]
        for reference in references:
            cells += [spread(ratios(reference, each)), f"{memory_ratio(reference, each):.2f}"]
        if several:
            cells += [format_traffic(each), "" if each.loopback is None else f"{each.loopback / MB:.1f}"]
        rows.append((*cells, each.ran if each.failed is None else f"{each.ran}; failed: {each.failed}"))
    return Table(group[0].cell.problem, rows)


def format_traffic(measured: Measured) -> str:
    """Return the megabytes of a process per step, by kind."""
    kinds = ((kind, f"{nbytes / MB:.1f}") for kind, nbytes in (measured.moved or {}).items())
    return ", ".join(f"{size} {kind}" for kind, size in kinds if size != "0.0") or "nothing"


def rows(groups: Sequence[Sequence[Measured]]) -> Iterator[dict[str, Any]]:
    """Yield every figure, a row per cell."""
    for group in groups:
        ours = next((each for each in whole(group) if each.cell.way == OURS), None)
        for each in group:
            cell = each.cell
            row: dict[str, Any] = {
                "size": cell.size,
                "rows": cell.rows,
                "row_tokens": cell.length,
                "processes": cell.processes,
                "checkpointing": cell.checkpointing,
                "way": cell.way,
                "failed": each.failed or "",
            }
            if each.turns:
                row |= {
                    "tokens_per_second": tokens_per_second(each),
                    "best_tokens_per_second": cell.tokens / min(each.seconds()),
                    "cpu_seconds": statistics.median(s for turn in each.turns for s in turn.cpu_seconds),
                    "peak_bytes_over_imports": each.over_imports,
                    "peak_bytes": each.peak,
                    "first_loss": each.losses[0],
                    "last_loss": each.losses[-1],
                    "network_bytes": each.loopback,
                    **{f"{kind}_bytes": nbytes for kind, nbytes in (each.moved or {}).items()},
                    "what_ran": each.ran,
                }
                if ours is not None:
                    each_round = ratios(ours, each)
                    row |= {"ours_times_as_fast": statistics.median(each_round)}
                    row |= {"ours_least": min(each_round), "ours_most": max(each_round)}
                    row |= {"ours_memory": memory_ratio(ours, each)}
            yield row


def reading(groups: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """Yield a sentence for each pair of ours and a peer over all problems, and a warning if first losses differ."""
    beside: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for group in groups:
        ours = [each for each in whole(group) if each.cell.way in REFERENCES]
        for each in whole(group):
            if not each.cell.way.startswith(OURS):
                for reference in ours:
                    pair = (statistics.median(ratios(reference, each)), memory_ratio(reference, each))
                    beside.setdefault((each.cell.way, reference.cell.way), []).append(pair)
    for (way, our_way), pairs in beside.items():
        speeds, memories = zip(*pairs, strict=True)
        yield (
            f"{WAYS[our_way].title} beside {WAYS[way].title}: {_range(speeds)} times as fast, with "
            f"{_range(memories)} of the memory ({len(pairs)} problem{'s' if len(pairs) > 1 else ''})."
        )
    for group in groups:
        first = {each.cell.title: each.losses[0] for each in group if each.losses}
        if first and max(first.values()) - min(first.values()) > AGREE:
            by_title = ", ".join(f"{title} {loss:.4f}" for title, loss in first.items())
            yield f"WARNING: the first losses of {group[0].cell.problem} differ: {by_title}."


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def draw(groups: Sequence[Sequence[Measured]], path: Path) -> None:
    """Plot speed and memory of each way, a group of bars per problem."""
    shown = [whole(group) for group in groups]
    shown = [group for group in shown if group]
    ways = [way for way in WAYS if any(each.cell.way == way for group in shown for each in group)]
    figure, panels = new_figure(2, width=13, height=1.5 + 0.16 * len(shown) * max(5, len(ways)))
    panel_values: tuple[tuple[str, Any], ...] = (
        ("tokens/s", tokens_per_second),
        ("memory of a step over imports, MiB per process", lambda each: each.over_imports / MIB),
    )
    for panel, (label, value) in zip(panels, panel_values, strict=True):
        for number, way in enumerate(ways):
            places, values = [], []
            for place, group in enumerate(shown):
                for each in group:
                    if each.cell.way == way:
                        places.append(place + (number - (len(ways) - 1) / 2) * 0.8 / len(ways))
                        values.append(value(each))
            colour = COLOURS[number % len(COLOURS)]
            bars = panel.barh(places, values, height=0.75 / len(ways), color=colour, label=WAYS[way].title)
            panel.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=6)
        names = [group[0].cell.problem.replace(", ", ",\n", 1) for group in shown]
        panel.set_yticks(range(len(shown)), names if panel is panels[0] else [], fontsize=7)
        panel.invert_yaxis()
        panel.margins(x=0.1)
        panel.set(xlabel=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    save(figure, path)


def skipped(reasons: Mapping[str, str]) -> str:
    """Return the ways that were left out, with their reasons."""
    return "; ".join(f"{WAYS[way].title}: {why}" for way, why in reasons.items())


SEED_WAYS = (OURS, "peft-documented")
"""Ways trained from a second adapter too, to measure the noise between seeds."""
WINDOW = 10
"""Steps of the running mean in the plot."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Differences of the losses of two curves, step by step."""

    first: Measured
    second: Measured

    @property
    def kind(self) -> str:
        """The kind of pair: between seeds, between ours, between peers, or ours and a peer."""
        if self.first.cell.way == self.second.cell.way:
            return "between seeds"
        ours = [curve.cell.way.startswith(OURS) for curve in (self.first, self.second)]
        if all(ours):
            return "between ours"
        return "ours and a peer" if any(ours) else "between peers"

    @property
    def by_step(self) -> list[float]:
        """Signed differences, in nats."""
        return [a - b for a, b in zip(self.first.losses, self.second.losses, strict=True)]

    @property
    def mean(self) -> float:
        """Mean of the signed differences, in nats."""
        return statistics.fmean(self.by_step)

    @property
    def mean_size(self) -> float:
        """Mean of the absolute differences, in nats."""
        return statistics.fmean(map(abs, self.by_step))

    @property
    def largest(self) -> float:
        """Largest absolute difference, in nats."""
        return max(map(abs, self.by_step))


def differences(curves: Sequence[Measured]) -> list[Difference]:
    """Return the differences of all pairs that start equal, and of each way's two seeds."""
    whole = [curve for curve in curves if curve.failed is None]
    pairs = itertools.combinations(whole, 2)
    return [
        Difference(a, b)
        for a, b in pairs
        if a.cell.processes == b.cell.processes and (a.cell.way == b.cell.way or a.cell.seed == b.cell.seed == 0)
    ]


def curve_reading(curves: Sequence[Measured]) -> Iterator[str]:
    """Yield the verdicts on the agreement of ours and the peers."""
    for processes in sorted({curve.cell.processes for curve in curves}):
        yield from _verdicts([curve for curve in curves if curve.cell.processes == processes])
    if any(curve.cell.processes > 1 for curve in curves):
        yield (
            "On several processes ours weighs the losses of a step by their tokens, and the peers average the means of "
            "the processes: packed sequences have unequal token counts, so the objectives differ."
        )


def _verdicts(curves: Sequence[Measured]) -> Iterator[str]:
    """Compare ours and the peers on one process count with the noise between seeds and between recipes."""
    by_kind: dict[str, list[Difference]] = {}
    for difference in differences(curves):
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
    verdict = " and ".join(
        f"{'no more than' if furthest.mean_size <= size else 'MORE than'} {kind} ({size:.4f})"
        for kind, size in chance.items()
    )
    processes = furthest.first.cell.processes
    yield (
        f"The losses of ours and of a peer on {processes} process{'es' if processes > 1 else ''} differ by "
        f"at most {furthest.mean_size:.4f} nats per step, mean absolute ({title(furthest.first)} and "
        f"{title(furthest.second)}): {verdict}."
    )


def title(curve: Measured) -> str:
    """Return the way's title, with the seed of a second start."""
    cell = curve.cell
    extra = "" if cell.seed == 0 else f", another start (seed {cell.seed})"
    return f"{WAYS[cell.way].title}{extra}"


def curve_tables(curves: Sequence[Measured]) -> Iterator[Table]:
    """Yield the table of losses and the table of differences."""
    last = min([10, *(len(curve.losses) for curve in curves if curve.failed is None)])
    rows = [("", "processes", "first loss", f"mean of the last {last}", "what ran")]
    for curve in curves:
        if curve.failed is None:
            losses = (f"{curve.losses[0]:.4f}", f"{statistics.fmean(curve.losses[-last:]):.4f}")
            rows.append((title(curve), str(curve.cell.processes), *losses, curve.ran))
        else:
            rows.append((title(curve), str(curve.cell.processes), "", "", f"failed: {curve.failed}"))
    yield Table("Losses", rows)
    rows = [("", "", "mean absolute", "mean", "largest")]
    order = ("between seeds", "between peers", "ours and a peer", "between ours")
    for each in sorted(differences(curves), key=lambda each: order.index(each.kind)):
        name = f"{title(each.first)} - {title(each.second)}"
        rows.append((name, each.kind, f"{each.mean_size:.4f}", f"{each.mean:+.4f}", f"{each.largest:.4f}"))
    yield Table("Differences of losses, step by step, in nats per token", rows)


def curve_rows(curves: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """Yield the loss of each step, a row per curve and step."""
    for curve in curves:
        cell = curve.cell
        for step, loss in enumerate(curve.losses, 1):
            yield {"way": cell.way, "processes": cell.processes, "seed": cell.seed, "step": step, "loss": loss}


def draw_curves(curves: Sequence[Measured], path: Path) -> None:
    """Plot the losses, and their difference from ours."""
    whole = [curve for curve in curves if curve.failed is None]
    figure, (above, beside) = new_figure(2, width=11, height=4.5)
    for number, curve in enumerate(whole):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": title(curve), "linewidth": 1.0}
        above.plot(range(1, len(curve.losses) + 1), curve.losses, **style)
        if curve is not whole[0]:
            gaps = _running([a - b for a, b in zip(curve.losses, whole[0].losses, strict=True)])
            beside.plot(range(WINDOW, WINDOW + len(gaps)), gaps, **style)
    above.set(xlabel="step", ylabel="loss, nats per token")
    if whole:
        beside.set(xlabel="step", ylabel=f"loss minus that of {title(whole[0])}, mean of {WINDOW}")
        above.legend(fontsize=7)
    save(figure, path)


def _running(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[start : start + WINDOW]) for start in range(len(values) - WINDOW + 1)]
