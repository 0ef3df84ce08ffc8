"""Measure the memory of training steps by category beside the plan: random Llamas on the ranks of this machine.

    python -m distlora.bench.memory REQUEST      (requests.MemoryBench; started by `distlora bench memory`)

Each step is real: random weights are written, loaded, sharded and trained with an adapter on every linear; the second
step is measured (distlora/training/memory_meter.py). The plan must be within 1 % of what persists from step to step,
and within 5 % of the peak.
"""

from __future__ import annotations

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

from distlora.bench.host_counters import free_port
from distlora.bench.machine import found_by, measurement_notes
from distlora.bench.processes import libraries_print_to_stderr, run_each, set_rank
from distlora.bench.random_inputs import LLAMA_1B5, LLAMA_700M, write_random_checkpoint
from distlora.bench.requests import MemoryBench, from_argument
from distlora.bench.step_memory import measure_step
from distlora.config import Config
from distlora.config.file import build
from distlora.output.figures import draw_bars
from distlora.output.result_files import Results
from distlora.output.tables import Table
from distlora.parallel import join_ranks, leave_ranks
from distlora.planner.machine import machine_of
from distlora.planner.memory import KINDS
from distlora.planner.memory.device import device_bytes
from distlora.planner.model import model_in
from distlora.planner.workload import Workload

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
"""Tokens per sequence, so that a step takes seconds on a CPU."""
MICRO_BATCHES = 2
"""Micro-batches of one sequence per rank and step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One way to train one of the models."""

    model: str
    ranks: int
    backend: Literal["fsdp2", "zero3"] = "fsdp2"
    checkpointing: Literal["none", "selective", "block", "offload"] = "block"
    accumulate: Literal["step", "block"] = "step"

    def config(self, folder: Path) -> Config:
        """Return the settings of a run on the model in `folder`."""
        sections: dict[str, Any] = {
            "model": {"path": str(folder)},
            "data": {"path": "none", "sequence_length": LENGTHS[self.model]},
            "adapter": {"r": 16, "target_modules": "all-linear"},
            # Each model is quantized once for all its cells.
            "quant": {"cache_dir": str(folder / "quantized")},
            "parallel": {"backend": self.backend},
            "train": {
                "micro_batch": 1,
                "global_batch": MICRO_BATCHES * self.ranks,
                "checkpointing": self.checkpointing,
                "accumulate": self.accumulate,
            },
            "cluster": {"gpus_per_node": self.ranks},
        }
        return build(Config, {**sections, "run_dir": "none"})


def cells(models: Sequence[str], ranks: Sequence[int]) -> Iterator[Cell]:
    """Yield every cell; the largest model has the default settings only, under both backends."""
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
    """Memory of a cell in bytes, measured on the rank with the highest peak, and planned."""

    cell: Cell
    part: str
    """Part of the step with the measured peak."""
    moment: str
    """Part of the step with the planned peak."""
    measured: dict[str, int]
    """Bytes by category, at the measured peak."""
    planned: dict[str, int]
    """Bytes by category, at the planned peak."""
    held: tuple[int, int]
    """Bytes that persist from step to step: measured, planned."""
    peak: tuple[int, int]
    """Peak bytes: measured, planned."""

    @property
    def worst(self) -> str:
        """The category with the largest difference."""
        kinds = self.measured | self.planned
        return max(kinds, key=lambda kind: abs(self.measured.get(kind, 0) - self.planned.get(kind, 0)))


def rank_main(
    rank: int, world: int, port: int, folders: dict[str, Path], rank_cells: Sequence[Cell], results: Any
) -> None:
    """Measure every cell of this world size, on one rank."""
    set_rank(rank, world, port)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    ranks, rows = join_ranks(), []
    here = found_by(ranks.device, ranks=world)
    for cell in rank_cells:
        if rank == 0:
            print(f"{cell.model} on {world} ranks: {cell.backend}, {cell.checkpointing}", file=sys.stderr, flush=True)
        config = cell.config(folders[cell.model])
        step = measure_step(config, ranks)
        plan = device_bytes(
            Workload.of(config), model_in(folders[cell.model]), machine_of(config.gpu, config.cluster, found=here)
        )
        rows.append(
            Row(
                cell=cell,
                part=step.part,
                moment=plan.worst,
                measured={kind: step.by_kind[kind] for kind in KINDS if kind in step.by_kind},
                planned={kind: nbytes for kind, nbytes in plan.by_kind.items() if kind != "slack"},
                held=(step.persistent, plan.persistent),
                peak=(step.peak, plan.peak),
            )
        )
        gc.collect()  # Before the next model: hooks and modules refer to each other.
    results.put((rank, rows))
    leave_ranks(ranks)


def measure(chosen: Sequence[Cell]) -> Iterator[Row]:
    """Yield the row of each cell, measured in fresh processes for each world size. RuntimeError if one fails."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in dict.fromkeys(cell.model for cell in chosen)}
        for name, folder in folders.items():
            write_random_checkpoint(folder, MODELS[name], num_shards=4)
        for world in dict.fromkeys(cell.ranks for cell in chosen):
            rank_cells, port = [cell for cell in chosen if cell.ranks == world], free_port()
            rows_by_rank = run_each(rank_main, [(rank, world, port, folders, rank_cells) for rank in range(world)])
            for rows in zip(*rows_by_rank, strict=True):
                yield max(rows, key=lambda row: row.peak[0])


def results(rows: Sequence[Row]) -> Results:
    """Return the table in MB of 1e6 bytes."""
    head = ["model", "ranks", "backend", "checkpointing", "accumulate", "persistent: measured", "planned", ""]
    lines = [[*head, "peak: measured", "planned", "", "in", "largest difference: measured, planned"]]
    for row in rows:
        cell = row.cell
        worst = f"{row.worst}: {_mb(row.measured.get(row.worst, 0))}, {_mb(row.planned.get(row.worst, 0))}"
        backend = "" if cell.ranks == 1 else cell.backend
        cells = [cell.model, str(cell.ranks), backend, cell.checkpointing, cell.accumulate]
        cells += [_mb(row.held[0]), _mb(row.held[1]), _difference(*row.held)]
        cells += [_mb(row.peak[0]), _mb(row.peak[1]), _difference(*row.peak)]
        lines.append([*cells, row.part if row.part == row.moment else f"{row.part}, planned {row.moment}", worst])
    by_name = {" ".join(map(str, dataclasses.astuple(row.cell))): row for row in rows}
    panels = [
        ("peak, MB", {name: row.peak[0] / 1e6 for name, row in by_name.items()}),
        ("planned over it, %", {name: 100 * (row.peak[1] / row.peak[0] - 1) for name, row in by_name.items()}),
    ]
    return Results(
        name="memory",
        heading="The memory of a training step, planned and measured",
        notes=measurement_notes("transformers"),
        tables=[Table("MB on the rank with the highest peak", lines)],
        rows=[flat(row) for row in rows],
        draw=lambda path: draw_bars("The memory of a training step", panels, path),
    )


def flat(row: Row) -> dict[str, Any]:
    """Return a row's figures in bytes, by category where it is measured or planned."""
    values = dataclasses.asdict(row.cell) | {"part": row.part, "moment": row.moment}
    for name, (measured, planned) in {"held": row.held, "peak": row.peak}.items():
        values |= {f"{name}_measured": measured, f"{name}_planned": planned}
    for kind in KINDS:
        if kind in row.measured or kind in row.planned:
            values |= {f"{kind}_measured": row.measured.get(kind, 0), f"{kind}_planned": row.planned.get(kind, 0)}
    return values


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f}"


def _difference(measured: int, planned: int) -> str:
    return f"{planned / measured - 1:+.1%}"


def main() -> None:
    """Run the worker: measure as the request says, and print."""
    request = from_argument(MemoryBench)
    with libraries_print_to_stderr():
        rows = list(measure(list(cells(request.models, request.ranks))))
    results(rows).show(out=None if request.out is None else Path(request.out), as_json=request.json)


if __name__ == "__main__":
    main()
