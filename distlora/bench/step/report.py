"""The tables, the sentences and the plot of `distlora bench step`. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distlora.bench.step.cells import OURS, WAYS
from distlora.bench.step.compare import Measured
from distlora.output.figures import COLOURS, new_figure, save
from distlora.output.tables import Table, spread

MIB, MB = 2**20, 10**6
REFERENCES = (OURS, "ours-compiled")
"""Ways that the others are compared with."""
HOW = (
    "ratios are of turns that follow each other; memory is the most anonymous memory of a process in its steps over "
    "that after its imports (on a GPU the most that torch had allocated there); ours has the environment that the "
    "launcher gives to workers, which on a CPU keeps freed pages and has waiting threads sleep, the peers that of the "
    "user, with as many threads"
)
"""How it was measured."""
AGREE = 0.02
"""Nats: how far the first losses of bf16 models that begin equal may be from each other."""


def tokens_per_second(measured: Measured) -> float:
    return measured.cell.tokens / statistics.median(measured.seconds())


def ratios(reference: Measured, other: Measured) -> list[float]:
    """How many times as fast the reference is, in each round."""
    return [sum(theirs.seconds) / sum(own.seconds) for own, theirs in zip(reference.turns, other.turns, strict=False)]


def share(reference: Measured, other: Measured) -> float:
    """The reference's memory over the other's."""
    return reference.over_imports / max(1, other.over_imports)


def whole(group: Sequence[Measured]) -> list[Measured]:
    """Those that had all their turns."""
    return [each for each in group if each.turns and each.failed is None]


def table(group: Sequence[Measured]) -> Table:
    """Of one problem."""
    references = [each for each in whole(group) if each.cell.way in REFERENCES]
    several = group[0].cell.processes > 1
    head = ["", "tokens/s", "best", "CPU s a step", "memory, MiB", "with imports", "losses"]
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
            cells += [spread(ratios(reference, each)), f"{share(reference, each):.2f}"]
        if several:
            cells += [moved_in_words(each), "" if each.loopback is None else f"{each.loopback / MB:.1f}"]
        rows.append((*cells, each.ran if each.failed is None else f"{each.ran}; failed: {each.failed}"))
    return Table(group[0].cell.problem, rows)


def moved_in_words(measured: Measured) -> str:
    """Megabytes of a process in a step, by kind."""
    kinds = ((kind, f"{nbytes / MB:.1f}") for kind, nbytes in (measured.moved or {}).items())
    return ", ".join(f"{size} {kind}" for kind, size in kinds if size != "0.0") or "nothing"


def rows(groups: Sequence[Sequence[Measured]]) -> Iterator[dict[str, Any]]:
    """Every figure, a row for each cell."""
    for group in groups:
        own = next((each for each in whole(group) if each.cell.way == OURS), None)
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
                if own is not None:
                    each_round = ratios(own, each)
                    row |= {"ours_times_as_fast": statistics.median(each_round)}
                    row |= {"ours_least": min(each_round), "ours_most": max(each_round)}
                    row |= {"ours_memory": share(own, each)}
            yield row


def reading(groups: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """A sentence for each peer and each way of ours beside it, over all problems; and where first losses disagree."""
    beside: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for group in groups:
        ours = [each for each in whole(group) if each.cell.way in REFERENCES]
        for each in whole(group):
            if not each.cell.way.startswith(OURS):
                for own in ours:
                    pair = (statistics.median(ratios(own, each)), share(own, each))
                    beside.setdefault((each.cell.way, own.cell.way), []).append(pair)
    for (way, own_way), pairs in beside.items():
        speeds, memories = zip(*pairs, strict=True)
        yield (
            f"{WAYS[own_way].title} beside {WAYS[way].title}: {_range(speeds)} times as fast, with "
            f"{_range(memories)} of the memory ({len(pairs)} problem{'s' if len(pairs) > 1 else ''})."
        )
    for group in groups:
        first = {each.cell.title: each.losses[0] for each in group if each.losses}
        if first and max(first.values()) - min(first.values()) > AGREE:
            said = ", ".join(f"{title} {loss:.4f}" for title, loss in first.items())
            yield f"WARNING: the first losses of {group[0].cell.problem} do not agree: {said}."


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def draw(groups: Sequence[Sequence[Measured]], path: Path) -> None:
    """Speed and memory of each way beside ours, a row of bars for each problem."""
    shown = [whole(group) for group in groups]
    shown = [group for group in shown if group]
    ways = [way for way in WAYS if any(each.cell.way == way for group in shown for each in group)]
    figure, panels = new_figure(2, width=13, height=1.5 + 0.16 * len(shown) * max(5, len(ways)))
    panel_values: tuple[tuple[str, Any], ...] = (
        ("tokens/s", tokens_per_second),
        ("memory of a step over imports, MiB a process", lambda each: each.over_imports / MIB),
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
    """Ways that were left out, and why."""
    return "; ".join(f"{WAYS[way].title}: {why}" for way, why in reasons.items())
