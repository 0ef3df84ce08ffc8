"""Names of a plan's categories, Markdown tables of several plans, and drawings of them. Imports no torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from distlora.planner import Plan
from distlora.planner.memory import KINDS, Kind
from distlora.planner.speed.rates import WAITS
from distlora.planner.speed.scaling import OWN, ScalingRow
from distlora.results.tables import COLOURS, new_figure, save
from distlora.system.numbers import size

Name = TypeVar("Name")

SOURCES = {"folder": "its folder", "hub cache": "its config.json", "built in": "the table of known models"}
"""Source of a model's sizes in words."""
BASES = {"nf4": "NF4", "keep": "kept", "mixed": "mixed", "none": "bf16"}
"""Format of the base by quant.method."""
RECOMPUTED = {
    "none": "recompute none",
    "selective": "recompute MLPs",
    "block": "recompute layers",
    "offload": "recompute layers",
}
"""Recomputation in backward by train.checkpointing."""


def largest(by_kind: Mapping[Kind, int], count: int = 3) -> str:
    """Return the largest categories: `codes of the base weights 17.1 GB, ...`."""
    kinds = sorted(by_kind.items(), key=lambda each: -each[1])[:count]
    return ", ".join(f"{KINDS[kind]} {size(nbytes)}" for kind, nbytes in kinds)


def rounded(parts: Mapping[Name, float], step: float) -> dict[Name, int]:
    """Round each part to whole steps so that they add up to their rounded sum; the largest remainders round up."""
    found = {name: int(value // step) for name, value in parts.items()}
    left = round(sum(parts.values()) / step) - sum(found.values())
    for name in sorted(parts, key=lambda name: parts[name] % step, reverse=True)[:left]:
        found[name] += 1
    return found


def shares(parts: Mapping[Name, float]) -> list[tuple[Name, int]]:
    """Return the percentage of each part, largest first, 100 in all; parts of 0 % are left out."""
    percents = rounded(parts, sum(parts.values()) / 100)
    ordered = sorted(percents.items(), key=lambda each: (-each[1], -parts[each[0]]))
    return [(name, percent) for name, percent in ordered if percent]


LEGEND = (
    "A cell: peak memory per GPU, tokens/s of all GPUs, and the fastest settings that fit:",
    "- NF4, bf16: format of the base; full: every parameter is trained",
    "- recompute: parts recomputed in backward (train.checkpointing); x N: sequences at once (train.micro_batch)",
    "- slices: a layer runs all sequences of a step in turn (train.accumulate=block); tiles: tokens (train.mlp_tile)",
    "- resident: layers that stay gathered (parallel.resident_blocks); replicas: copies of the base and GPUs per "
    "replica (parallel.shard_degree)",
    "- on the host: offloaded to host memory, and the host memory per node (parallel.offload_base)",
    "- no: memory needed with the current settings; `distlora plan` of one model and GPU says what would fit",
)
"""Explanation of a cell."""


def matrix(plans: Mapping[tuple[str, str], Plan | None]) -> Iterator[str]:
    """Yield a table of plans by (model, machine), a row per model; None: the settings are not possible there."""
    models, machines = (list(dict.fromkeys(key[place] for key in plans)) for place in (0, 1))
    rows = [[model, *(cell(plans[model, machine]) for machine in machines)] for model in models]
    yield from markdown(["", *machines], rows)
    yield ""
    yield from LEGEND


def cell(plan: Plan | None) -> str:
    """Return a plan in a cell: `17.4 GB, 1,210 tok/s: NF4, recompute layers, x 1`, or its need if it does not fit."""
    if plan is None:
        return "not possible"
    needed, usable = plan.device.total / 1e9, plan.machine.usable_bytes
    if plan.fits is False:
        return f"no: {needed:.1f} GB" + ("" if usable is None else f" of {usable / 1e9:.1f}")
    time = plan.time
    speed = "" if time is None else f", {time.tokens_per_second:,.0f} tok/s"
    return f"{needed:.1f} GB{speed}: {', '.join(how(plan))}"


def how(plan: Plan) -> Iterator[str]:
    """Yield the settings that a plan fits with, in a few words each."""
    config = plan.config
    train, parallel = config.train, config.parallel
    yield "full" if config.adapter.method == "full" else BASES[config.quant.method]
    yield RECOMPUTED[train.checkpointing]
    yield f"x {train.micro_batch}"
    if train.accumulate == "block":
        yield "slices"
    if train.mlp_tile is not None:
        yield f"tiles of {train.mlp_tile:,}"
    if parallel.offload_base or train.checkpointing == "offload":
        what = ["base"] * parallel.offload_base + ["inputs"] * (train.checkpointing == "offload")
        yield f"{' and '.join(what)} on the host ({size(plan.host.machine)})"
    if parallel.resident_blocks:
        yield f"{parallel.resident_blocks} resident"
    if plan.work.expert_degree > 1:
        yield f"experts over {plan.work.expert_degree}"
    if plan.traffic.shards < plan.machine.ranks:
        yield f"{plan.machine.ranks // plan.traffic.shards} replicas of {plan.traffic.shards}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        yield f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True))} |"


def scaling_tables(rows: Sequence[ScalingRow]) -> Iterator[str]:
    """Yield a table per fabric: a row per number of GPUs, the ways to shard the base side by side, the assumptions."""
    for fabric in dict.fromkeys(row.fabric for row in rows):
        found = [row for row in rows if row.fabric == fabric]
        layouts = list(dict.fromkeys(row.layout for row in found))
        by_place = {(row.ranks, row.layout): row for row in found}
        header = ["GPUs", "nodes", "sequences per step"]
        for layout in layouts:
            header += [f"{layout}: s per step", "tokens/s", "per GPU", "MFU", "waits for"]
        lines = []
        for ranks in dict.fromkeys(row.ranks for row in found):
            first = next(row for row in found if row.ranks == ranks)
            cells = [f"{ranks:,}", f"{first.machines:,}", f"{first.rows:,}"]
            for layout in layouts:
                cells += _scaling_cells(by_place.get((ranks, layout)))
            lines.append(cells)
        yield f"over {'the links of the node' if fabric == OWN else fabric}:"
        yield ""
        yield from markdown(header, lines)
        yield ""
    yield "Assumptions:"
    yield from (f"- {each}" for each in dict.fromkeys(each for row in rows for each in row.assumptions))


LEVERED = (1, 8, 64, 512)
"""GPUs whose leverage a table shows."""


def leverage_table(rows: Sequence[ScalingRow]) -> Iterator[str]:
    """Yield the fraction of tokens/s that remains if an assumed rate is halved, largest effect first."""
    shown = [row for row in rows if row.fabric == OWN and row.layout == "one replica" and row.ranks in LEVERED]
    levers = sorted(shown[0].if_half, key=lambda lever: min(row.if_half[lever] for row in shown))
    header = ["half of the rate", *(f"{row.ranks:,} GPU{'s' if row.ranks > 1 else ''}" for row in shown)]
    yield "Fraction of the tokens/s of one replica that remains if one rate is half of the assumed one:"
    yield ""
    yield from markdown(header, [[lever, *(f"{row.if_half[lever]:.0%}" for row in shown)] for lever in levers])


def _scaling_cells(row: ScalingRow | None) -> list[str]:
    if row is None:
        return [""] * 5
    fits = "" if row.fits is not False else " (does not fit)"
    return [
        f"{row.seconds:,.0f}{fits}" if row.seconds >= 100 else f"{row.seconds:.3g}{fits}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.tokens_of_a_rank:,.0f} ({row.efficiency:.0%})",
        f"{row.mfu:.0%}",
        WAITS[row.binds],
    ]


_STYLES = {"one replica": "-o", "replica per node": "--s"}


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
    panel.set(xlabel="GPUs", ylabel="tokens/s per GPU")
    panel.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


_LABELLED = 0.045
"""Share of the panel's width from which a segment has its GB written in it."""


def plot_memory(plans: Mapping[str, Plan], title: str, path: Path) -> None:
    """Draw a stacked bar per plan in GB (1e9 bytes) on the available memory, with its sum, in red if it is too much."""
    from matplotlib import colormaps

    figure, (panel,) = new_figure(1, width=11, height=2.7 + 0.52 * len(plans))
    widest = max(max(plan.device.total, plan.machine.usable_bytes or 0) for plan in plans.values()) / 1e9
    colours = dict(zip(KINDS, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    kinds = [kind for kind in KINDS if any(plan.device.by_kind.get(kind, 0) > widest * 1e6 for plan in plans.values())]
    for row, plan in enumerate(plans.values()):
        there = math.inf if plan.machine.usable_bytes is None else plan.machine.usable_bytes / 1e9
        if there < math.inf:
            panel.barh(row, there, height=0.8, color="#efefef", edgecolor="black")
        place = 0.0
        for kind in kinds:
            size = plan.device.by_kind.get(kind, 0) / 1e9
            panel.barh(row, size, left=place, height=0.62, color=colours[kind], label="" if row else KINDS[kind])
            if size > _LABELLED * widest:
                panel.text(place + size / 2, row, f"{size:.1f}", ha="center", va="center", fontsize=8)
            place += size
        text = f"{place:.1f}" + (f" of {there:.1f} GB" if there < math.inf else " GB")
        end = place if math.isinf(there) else max(place, there)
        panel.text(end + 0.012 * widest, row, text, va="center", color="black" if place <= there else COLOURS[1])
    panel.set_yticks(range(len(plans)), list(plans))
    panel.set_ylim(len(plans) - 0.4, -0.6)
    panel.set_xlim(0, 1.17 * widest)
    panel.set(xlabel="peak memory per rank in GB; grey: available")
    panel.set_title("\n".join(textwrap.wrap(title, 110)), fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save(figure, path)
