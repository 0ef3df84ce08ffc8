"""The memory of a training step, planned and measured, by kind: random Llamas of several sizes on the ranks of this
machine, its GPUs or processes of its CPU.

    python -m distlora.bench.against_plan [--models 10M,100M] [--ranks 1,2] [--json]      (`distlora bench memory`)

Each step is real: random weights are written, loaded, cut over ranks and trained with an adapter on every linear; the
second step is measured (distlora/training/memory_meter.py). What stays from step to step is to be planned within 1 %,
the peak within 5 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distlora.bench.checkpoints import LLAMA_1B5, LLAMA_700M, write_random_checkpoint
from distlora.bench.machine import found_by, made_here
from distlora.bench.network import free_port
from distlora.bench.processes import own_stdout, run_each
from distlora.bench.step_memory import measure_step
from distlora.config import Config
from distlora.config.file import build
from distlora.output.figures import draw_bars
from distlora.output.result_files import Results
from distlora.output.tables import Table
from distlora.parallel import join_ranks, leave_ranks
from distlora.planner.machine import machine_of
from distlora.planner.memory.device import device_bytes
from distlora.planner.memory.kinds import KINDS
from distlora.planner.model import model_in

_SMALL = LLAMA_700M | {"vocab_size": 8192, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "10M": _SMALL | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8},
    "100M": LLAMA_700M
    | {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10}
    | {"num_key_value_heads": 5},
    "0.5B": LLAMA_700M | {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24},
    "1.5B": LLAMA_1B5,
}
"""config.json of each Llama."""
LENGTHS = {"10M": 512, "100M": 256, "0.5B": 128, "1.5B": 128}
"""Tokens of a row: a CPU takes seconds a step."""
ROWS = 2
"""Micro-batches of one row that a rank has in a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A way to train one of the models."""

    model: str
    ranks: int
    backend: Literal["fsdp2", "zero3"] = "fsdp2"
    checkpointing: Literal["none", "selective", "block", "offload"] = "block"
    accumulate: Literal["step", "block"] = "step"

    def config(self, folder: Path) -> Config:
        sections: dict[str, Any] = {
            "model": {"path": str(folder)},
            "data": {"path": "none", "sequence_length": LENGTHS[self.model]},
            "adapter": {"r": 16, "target_modules": "all-linear"},
            # Each model is quantized once for all its cells.
            "quant": {"cache_dir": str(folder / "quantized")},
            "parallel": {"backend": self.backend},
            "train": {
                "micro_batch": 1,
                "global_batch": ROWS * self.ranks,
                "checkpointing": self.checkpointing,
                "accumulate": self.accumulate,
            },
            "cluster": {"gpus_per_node": self.ranks},
        }
        return build(Config, {**sections, "run_dir": "none"})


def cells(models: Sequence[str], ranks: Sequence[int]) -> Iterator[Cell]:
    """Of the largest model the default way alone, under both backends."""
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    for model in models:
        for count in ranks:
            yield Cell(model=model, ranks=count)
            if count > 1 and has_deepspeed:
                yield Cell(model=model, ranks=count, backend="zero3")
            if model != "1.5B":
                for mode in ("none", "selective", "offload"):
                    yield Cell(model=model, ranks=count, checkpointing=mode)
                yield Cell(model=model, ranks=count, accumulate="block")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A cell as it was measured on the rank that had most, and as it is planned, in bytes."""

    cell: Cell
    part: str
    """Of the step that the measured peak was in."""
    moment: str
    """Of the planned one."""
    measured: dict[str, int]
    """By kind, at the peak."""
    planned: dict[str, int]
    held: tuple[int, int]
    """Measured and planned: what stays from step to step,"""
    peak: tuple[int, int]
    """and the most there is."""

    @property
    def worst(self) -> str:
        """The kind that is furthest off."""
        kinds = self.measured | self.planned
        return max(kinds, key=lambda kind: abs(self.measured.get(kind, 0) - self.planned.get(kind, 0)))


def rank_main(rank: int, world: int, port: int, folders: dict[str, Path], own: Sequence[Cell], results: Any) -> None:
    """One rank's process: every cell that has so many ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    ranks, rows = join_ranks(), []
    here = found_by(ranks.device, ranks=world)
    for cell in own:
        if rank == 0:
            print(f"{cell.model} on {world} ranks: {cell.backend}, {cell.checkpointing}", file=sys.stderr, flush=True)
        config = cell.config(folders[cell.model])
        found = measure_step(config, ranks)
        plan = device_bytes(config, model_in(folders[cell.model]), machine_of(config, found=here))
        planned: dict[str, int] = {kind: nbytes for kind, nbytes in plan.by_kind.items() if kind != "slack"}
        measured: dict[str, int] = {kind: found.by_kind[kind] for kind in KINDS if kind in found.by_kind}
        rows.append(
            Row(
                cell=cell,
                part=found.part,
                moment=plan.worst,
                measured=measured,
                planned=planned,
                held=(found.persistent, plan.persistent),
                peak=(found.peak, plan.peak),
            )
        )
        gc.collect()  # Before the next model: hooks and modules refer to each other.
    results.put((rank, rows))
    leave_ranks(ranks)


def measure(chosen: Sequence[Cell]) -> Iterator[Row]:
    """Each cell, in processes of their own for each number of ranks. RuntimeError where one fails."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in dict.fromkeys(cell.model for cell in chosen)}
        for name, folder in folders.items():
            write_random_checkpoint(folder, MODELS[name], num_shards=4)
        for world in dict.fromkeys(cell.ranks for cell in chosen):
            own, port = [cell for cell in chosen if cell.ranks == world], free_port()
            of_ranks = run_each(rank_main, [(rank, world, port, folders, own) for rank in range(world)])
            for rows in zip(*of_ranks, strict=True):
                yield max(rows, key=lambda row: row.peak[0])


def results(rows: Sequence[Row]) -> Results:
    """In MB of 1e6 bytes."""
    head = ["model", "ranks", "backend", "checkpointing", "accumulate", "stays: measured", "planned", ""]
    lines = [[*head, "peak: measured", "planned", "", "in", "furthest off: measured, planned"]]
    for row in rows:
        cell = row.cell
        worst = f"{row.worst}: {_mb(row.measured.get(row.worst, 0))}, {_mb(row.planned.get(row.worst, 0))}"
        backend = "" if cell.ranks == 1 else cell.backend
        cells = [cell.model, str(cell.ranks), backend, cell.checkpointing, cell.accumulate]
        cells += [_mb(row.held[0]), _mb(row.held[1]), _off(*row.held)]
        cells += [_mb(row.peak[0]), _mb(row.peak[1]), _off(*row.peak)]
        lines.append([*cells, row.part if row.part == row.moment else f"{row.part}, planned {row.moment}", worst])
    off = {
        " ".join([cell.model, str(cell.ranks), cell.backend, cell.checkpointing, cell.accumulate]): row
        for row in rows
        for cell in (row.cell,)
    }
    panels = [
        ("peak, MB", {name: row.peak[0] / 1e6 for name, row in off.items()}),
        ("planned over it, %", {name: 100 * (row.peak[1] / row.peak[0] - 1) for name, row in off.items()}),
    ]
    return Results(
        name="memory",
        heading="The memory of a training step, planned and measured",
        notes=made_here("transformers"),
        tables=[Table("MB of the rank that has most", lines)],
        rows=[flat(row) for row in rows],
        draw=lambda path: draw_bars("The memory of a training step", panels, path),
    )


def flat(row: Row) -> dict[str, Any]:
    """Bytes; of each kind where it was measured and where it is planned."""
    values = dataclasses.asdict(row.cell) | {"part": row.part, "moment": row.moment}
    for name, (measured, planned) in {"held": row.held, "peak": row.peak}.items():
        values |= {f"{name}_measured": measured, f"{name}_planned": planned}
    for kind in KINDS:
        if kind in row.measured or kind in row.planned:
            values |= {f"{kind}_measured": row.measured.get(kind, 0), f"{kind}_planned": row.planned.get(kind, 0)}
    return values


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _off(measured: int, planned: int) -> str:
    return f"{planned / measured - 1:+.1%}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="10M,100M")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    chosen = list(cells(options.models.split(","), [int(count) for count in options.ranks.split(",")]))
    with own_stdout():
        rows = list(measure(chosen))
    results(rows).show(out=options.out, as_json=options.json)


if __name__ == "__main__":
    main()
