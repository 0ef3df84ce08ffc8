"""Plans beside each other, as Markdown: models on machines. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from distlora.plan import Plan

BASES = {"nf4": "NF4", "none": "bf16"}


def matrix(plans: Mapping[tuple[str, str], Plan | None]) -> Iterator[str]:
    """A row for each model, a column for each machine, by (model, machine); None: no plan, as the settings cannot be
    there."""
    models, machines = (list(dict.fromkeys(key[place] for key in plans)) for place in (0, 1))
    rows = [[model, *(cell(plans[model, machine]) for machine in machines)] for model in models]
    yield from markdown(["", *machines], rows)


def cell(plan: Plan | None) -> str:
    """`17.4 GB, 1,210 tok/s: NF4, block, 1 row`, or what it would take."""
    if plan is None:
        return "cannot be"
    needed, usable = plan.device.total / 1e9, plan.machine.usable_bytes
    if plan.fits is False:
        return f"no: {needed:.1f} GB" + ("" if usable is None else f" of {usable / 1e9:.1f}")
    time = plan.time
    speed = "" if time is None else f", {time.tokens_per_second:,.0f} tok/s"
    return f"{needed:.1f} GB{speed}: {', '.join(how(plan))}"


def how(plan: Plan) -> Iterator[str]:
    """The settings that a plan fits with, in a word each."""
    config = plan.config
    train, parallel = config.train, config.parallel
    yield BASES[config.quant.method]
    yield train.checkpointing
    yield f"{train.micro_batch} row{'s' if train.micro_batch > 1 else ''}"
    if train.accumulate == "block":
        yield "slices"
    if train.mlp_tile is not None:
        yield f"tiles of {train.mlp_tile:,}"
    if parallel.offload_base:
        yield "host base"
    if parallel.resident_blocks:
        yield f"{parallel.resident_blocks} stay"
    if plan.wire.shards < plan.machine.ranks:
        yield f"copies of {plan.wire.shards}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, its cells as wide as the widest of their column, so that it reads in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        yield f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True))} |"
