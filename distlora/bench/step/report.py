"""Make the tables, sentences and plots of `distlora bench step`, of steps and of loss curves. Imports no torch."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.bench.step.compare import OURS, UNCOMPILED, WAYS, Measured
from distlora.output.results import COLOURS, Table, draw_bars, new_figure, save, spread

MIB = 2**20
REFERENCES = (OURS, UNCOMPILED)
"""Ways of ours that the peers are compared with."""
HOW = (
    "ratios compare turns of the same round; memory is the peak anonymous memory of a process in its steps over that "
    "after its imports (on a GPU the peak that torch allocated); ours runs in the environment that the launcher sets "
    "for workers (on a CPU malloc keeps freed pages and waiting threads sleep), the peers in the user's, with as many "
    "threads"
)
"""Method of the measurement, printed below the tables."""


def tokens_per_second(measured: Measured) -> float:
    """Return the median over the measured steps."""
    return measured.cell.tokens / statistics.median(measured.seconds())


def ratios(reference: Measured, other: Measured) -> list[float]:
    """Return the speed of the reference over the other's, by round."""
    return [sum(theirs.seconds) / sum(ours.seconds) for ours, theirs in zip(reference.turns, other.turns, strict=False)]


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
    head += ["moved, MB"] if several else []
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
            cells += [spread(ratios(reference, each)), f"{reference.over_imports / max(1, each.over_imports):.2f}"]
        if several:
            kinds = ((kind, f"{nbytes / 1e6:.1f}") for kind, nbytes in (each.moved or {}).items())
            moved = ", ".join(f"{size} {kind}" for kind, size in kinds if size != "0.0")
            cells.append(moved or "nothing")
        rows.append((*cells, each.ran if each.failed is None else f"{each.ran}; failed: {each.failed}"))
    return Table(group[0].cell.problem, rows)


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
                    **{f"{kind}_bytes": nbytes for kind, nbytes in (each.moved or {}).items()},
                    "what_ran": each.ran,
                }
                if ours is not None:
                    each_round = ratios(ours, each)
                    row |= {"ours_times_as_fast": statistics.median(each_round)}
                    row |= {"ours_least": min(each_round), "ours_most": max(each_round)}
                    row |= {"ours_memory": ours.over_imports / max(1, each.over_imports)}
            yield row


def reading(groups: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """Yield a sentence for each pair of ours and a peer over all problems, and a warning if first losses differ."""
    beside: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for group in groups:
        ours = [each for each in whole(group) if each.cell.way in REFERENCES]
        for each in whole(group):
            if not each.cell.way.startswith(OURS):
                for reference in ours:
                    memory = reference.over_imports / max(1, each.over_imports)
                    pair = (statistics.median(ratios(reference, each)), memory)
                    beside.setdefault((each.cell.way, reference.cell.way), []).append(pair)
    for (way, our_way), pairs in beside.items():
        speeds, memories = zip(*pairs, strict=True)
        yield (
            f"{WAYS[our_way].title} beside {WAYS[way].title}: {_range(speeds)} times as fast, with "
            f"{_range(memories)} of the memory ({len(pairs)} problem{'s' if len(pairs) > 1 else ''})."
        )
    for group in groups:
        # A bf16 base of real weights has other losses than their 4-bit copies.
        first = {
            each.cell.title: each.losses[0] for each in group if each.losses and "base" not in WAYS[each.cell.way].job
        }
        # bf16 models that start equal differ by less than 0.02 nats.
        if first and max(first.values()) - min(first.values()) > 0.02:
            by_title = ", ".join(f"{title} {loss:.4f}" for title, loss in first.items())
            yield f"WARNING: the first losses of {group[0].cell.problem} differ: {by_title}."


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def draw(groups: Sequence[Sequence[Measured]], path: Path) -> None:
    """Plot speed and memory of each way on each problem."""
    cells = {f"{each.cell.title}\n{each.cell.problem}": each for group in groups for each in whole(group)}
    panels = [
        ("tokens/s", {name: tokens_per_second(each) for name, each in cells.items()}),
        ("MiB per process over imports", {name: each.over_imports / MIB for name, each in cells.items()}),
    ]
    draw_bars("A training step", panels, path)


SEED_WAYS = (OURS, "peft-documented")
"""Ways trained from a second adapter too, to measure the noise between seeds."""
WINDOW = 10
"""Steps of the running mean in the plot."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Differences of the losses of two curves, step by step."""

    first: Measured
    second: Measured
    kind: str
    """The pair: between seeds, between ours, between peers, or ours and a peer."""
    by_step: list[float]
    """Signed differences, in nats."""

    @property
    def mean_size(self) -> float:
        """Mean of the absolute differences, in nats."""
        return statistics.fmean(map(abs, self.by_step))


def differences(curves: Sequence[Measured]) -> Iterator[Difference]:
    """Yield the differences of all pairs that start equal, and of each way's two seeds."""
    for a, b in itertools.combinations([curve for curve in curves if curve.failed is None], 2):
        same_way = a.cell.way == b.cell.way
        if a.cell.processes == b.cell.processes and (same_way or a.cell.seed == b.cell.seed == 0):
            num_ours = sum(curve.cell.way.startswith(OURS) for curve in (a, b))
            kind = "between seeds" if same_way else ("between peers", "ours and a peer", "between ours")[num_ours]
            yield Difference(a, b, kind, [x - y for x, y in zip(a.losses, b.losses, strict=True)])


def curve_reading(curves: Sequence[Measured]) -> Iterator[str]:
    """Yield the verdicts on ours and the peers, beside the noise between seeds and between recipes."""
    for processes in sorted({curve.cell.processes for curve in curves}):
        by_kind: dict[str, list[Difference]] = {}
        for difference in differences([curve for curve in curves if curve.cell.processes == processes]):
            by_kind.setdefault(difference.kind, []).append(difference)
        kinds = [kind for kind in ("between seeds", "between peers") if kind in by_kind]
        if not kinds or "ours and a peer" not in by_kind:
            continue
        furthest = max(by_kind["ours and a peer"], key=lambda each: each.mean_size)
        verdicts = []
        for kind in kinds:
            size = max(each.mean_size for each in by_kind[kind])
            verdicts.append(f"{'no more than' if furthest.mean_size <= size else 'MORE than'} {kind} ({size:.4f})")
        yield (
            f"The losses of ours and of a peer on {processes} process{'es' if processes > 1 else ''} differ by "
            f"at most {furthest.mean_size:.4f} nats per step, mean absolute ({title(furthest.first)} and "
            f"{title(furthest.second)}): {' and '.join(verdicts)}."
        )
    if any(curve.cell.processes > 1 for curve in curves):
        yield (
            "On several processes ours weighs the losses of a step by their tokens, and the peers average the means of "
            "the processes: packed sequences have unequal token counts, so the objectives differ."
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
        mean, largest = statistics.fmean(each.by_step), max(map(abs, each.by_step))
        rows.append((name, each.kind, f"{each.mean_size:.4f}", f"{mean:+.4f}", f"{largest:.4f}"))
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
            apart = [a - b for a, b in zip(curve.losses, whole[0].losses, strict=True)]
            gaps = [statistics.fmean(apart[start : start + WINDOW]) for start in range(len(apart) - WINDOW + 1)]
            beside.plot(range(WINDOW, WINDOW + len(gaps)), gaps, **style)
    above.set(xlabel="step", ylabel="loss, nats per token")
    if whole:
        beside.set(xlabel="step", ylabel=f"loss minus that of {title(whole[0])}, mean of {WINDOW}")
        above.legend(fontsize=7)
    save(figure, path)
