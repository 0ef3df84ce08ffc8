"""Trials of a sweep on one base, packed and one after the other: how long a step takes and what it gathers.

    python -m distlora.bench.packed BASE [--trials 1,2,4,8] [--lengths 16,64] [--ranks 1,2] [--repeats 20]
                                                                                (`distlora bench packed`)

Each trial has micro-batches of one row and an adapter of rank 16 on every linear of the 4-bit base in BASE. A step of
one trial alone, one of each of k trials, and one of the pack take turns. On a CPU seconds are this process' own, which
other work on the machine changes less than the clock's. Beside them stands what the planner's counts say before: bytes
and operations of a pack's step over one trial's, at rates that are measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlora.bench.machine import found_by, made_here
from distlora.bench.network import free_port
from distlora.bench.pack_step import PackStep
from distlora.bench.processes import own_stdout, run_each
from distlora.bench.step_time import Rates, copy, medians, planned, product
from distlora.config import Config
from distlora.config.file import build
from distlora.output.figures import draw_bars
from distlora.output.result_files import Results
from distlora.output.tables import Table
from distlora.parallel import join_ranks, leave_ranks
from distlora.planner.machine import Found, machine_of
from distlora.planner.model import PlannedModel, model_in
from distlora.planner.multi_trial import together
from distlora.planner.speed.step_work import step_work

RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A pack beside its trials, of the rank that took longest."""

    trials: int
    ranks: int
    tokens: int
    """Of a micro-batch of one trial."""
    alone: float
    """Seconds of a step of one trial."""
    sequential: float
    """Of a step of each, one after the other."""
    packed: float
    predicted: float
    """packed / alone, by the plan."""
    operations: float
    """Of the pack over those of one trial, counted."""
    moved: float
    """The same of bytes of memory."""
    gathered: tuple[int, int]
    """Bytes a step of one trial and of the pack, as the backend counts them."""

    @property
    def ratio(self) -> float:
        return self.packed / self.alone


def config_of(base: Path, *, length: int, ranks: int, seed: int) -> Config:
    sections: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"path": "none", "sequence_length": length},
        "adapter": {"r": RANK, "target_modules": "all-linear"},
        "quant": {"cache": False},
        "train": {"micro_batch": 1, "global_batch": ranks, "seed": seed},
        "cluster": {"gpus_per_node": ranks},
        "run_dir": "none",
    }
    return build(Config, sections)


def rank_main(
    rank: int, world: int, port: int, base: Path, cells: Sequence[tuple[int, int]], repeats: int, results: Any
) -> None:
    """One rank's process: every (trials, length)."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)  # Of several the ones that wait would count.
    ranks, rows = join_ranks(), []
    for number, length in cells:
        if rank == 0:
            print(f"{number} trials of rows of {length} tokens on {world} ranks", file=sys.stderr, flush=True)
        trials = [config_of(base, length=length, ranks=world, seed=seed) for seed in range(number)]
        alone, pack = PackStep(trials[:1], ranks, in_slots=False), PackStep(trials, ranks)
        rows.append(_measure(alone, pack, base, repeats))
    results.put((rank, rows))
    leave_ranks(ranks)


def _measure(alone: PackStep, pack: PackStep, base: Path, repeats: int) -> Row:
    """Medians of steps that take turns."""
    config, ranks, number = pack.trials[0], pack.ranks, len(pack.trials)
    sizes = json.loads((base / "config.json").read_text())
    gathered = tuple(_gathered(each) for each in (alone, pack))
    products, operations = product(config, sizes, ranks.device)
    copies, nbytes = copy(ranks.device)

    def one_after_the_other() -> None:
        for _ in range(number):
            alone.run(1)

    runs: list[Callable[[], object]] = [lambda: alone.run(1), one_after_the_other, lambda: pack.run(1)]
    if ranks.world == 1:  # Else others would wait meanwhile.
        runs += [products, copies]
    times = medians(runs, ranks.device, repeats)
    rates = Rates(operations / times[3], nbytes / times[4]) if ranks.world == 1 else None
    return Row(
        trials=number,
        ranks=ranks.world,
        tokens=config.tokens_at_once,
        alone=times[0],
        sequential=times[1],
        packed=times[2],
        gathered=(gathered[0], gathered[1]),
        **predicted(pack.trials, model_in(base), found_by(ranks.device, ranks=ranks.world), rates),
    )


def _gathered(steps: PackStep) -> int:
    """By the second step: the first checks the base."""
    steps.run(0)
    steps.backend.traffic.take()
    steps.run(1)
    return steps.backend.traffic.take().gathered_bytes


def predicted(trials: Sequence[Config], model: PlannedModel, here: Found, rates: Rates | None) -> dict[str, float]:
    """What the plan says of a pack over one of its trials."""
    configs = [trials[0], together(trials)]
    works = [step_work(config, model, machine_of(config, found=here)) for config in configs]
    ratio = float("nan")
    if rates is not None:
        alone, pack = (planned(config, model, here, rates).seconds for config in configs)
        ratio = pack / alone
    return {
        "predicted": ratio,
        "operations": works[1].flops / works[0].flops,
        "moved": sum(works[1].moved.values()) / sum(works[0].moved.values()),
    }


def measure(base: Path, ranks: Sequence[int], cells: Sequence[tuple[int, int]], repeats: int) -> Iterator[Row]:
    """Each cell on each number of ranks, in processes of their own. RuntimeError where one fails."""
    for world in ranks:
        port = free_port()
        of_ranks = run_each(rank_main, [(rank, world, port, base, cells, repeats) for rank in range(world)])
        for rows in zip(*of_ranks, strict=True):
            yield max(rows, key=lambda row: row.packed)


def results(rows: Sequence[Row]) -> Results:
    head = ["trials", "ranks", "tokens of each", "one alone, ms", "one after the other", "packed", "packed / one alone"]
    lines = [[*head, "planned", "operations", "bytes of memory", "gathered, of one alone"]]
    for row in rows:
        times = [f"{1e3 * each:.1f}" for each in (row.alone, row.sequential, row.packed)]
        gathered = f"{row.gathered[1] / row.gathered[0]:.2f} x" if row.gathered[0] else "nothing"
        planned = "" if row.predicted != row.predicted else f"{row.predicted:.2f}"
        cells = [str(row.trials), str(row.ranks), str(row.tokens), times[0]]
        cells += [f"{times[1]} ({row.sequential / row.alone:.2f} x)", times[2], f"{row.ratio:.2f} x", planned]
        lines.append([*cells, f"{row.operations:.2f} x", f"{row.moved:.2f} x", gathered])
    bars = {f"{row.trials} trials, {row.ranks} ranks, {row.tokens} tokens": row for row in rows}
    panels = [
        ("packed / one alone", {name: row.ratio for name, row in bars.items()}),
        ("one after the other / packed", {name: row.sequential / row.packed for name, row in bars.items()}),
    ]
    return Results(
        name="packed",
        heading="Trials of a sweep on one base, packed and one after the other",
        notes=made_here("transformers"),
        tables=[Table("Seconds of this process' CPU where there is no GPU", lines)],
        rows=[flat(row) for row in rows],
        draw=lambda path: draw_bars("A step of a pack", panels, path),
    )


def flat(row: Row) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    one, pack = values.pop("gathered")
    return values | {"gathered_alone": one, "gathered_packed": pack}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--trials", default="1,2,4,8")
    parser.add_argument("--lengths", default="16,64")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    numbers, lengths, ranks = (
        [int(each) for each in getattr(options, name).split(",")] for name in ("trials", "lengths", "ranks")
    )
    cells = [(number, length) for length in lengths for number in numbers]
    with own_stdout():
        rows = list(measure(options.base, ranks, cells, options.repeats))
    results(rows).show(out=options.out, as_json=options.json)


if __name__ == "__main__":
    main()
