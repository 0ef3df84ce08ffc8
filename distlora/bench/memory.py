"""Measure the memory of training steps by category beside the plan: random Llamas on the ranks of this node.

Each step is real: random weights are written, loaded, sharded and trained with an adapter on every linear; the second
step is measured (distlora/training/memory_meter.py). The plan must be within 1 % of what persists from step to step,
and within 5 % of the peak.
"""

import dataclasses
import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from distlora.bench.host import free_port, libraries_print_to_stderr, measurement_notes, run_each, set_rank
from distlora.bench.random_inputs import LLAMA_1B5, LLAMA_700M, random_tokens, write_random_checkpoint
from distlora.bench.requests import MemoryBench
from distlora.bench.trial import Started
from distlora.config import Config, require
from distlora.config.file import build
from distlora.data.loader import MicroBatch, Share, StepBatch, stacks
from distlora.model.build import put_trial
from distlora.output.results import Results, Table, draw_bars
from distlora.parallel import Ranks, join_ranks, leave_ranks
from distlora.planner.machine import LocalHardware, machine_of
from distlora.planner.memory import KINDS
from distlora.planner.memory.device import device_bytes
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from distlora.system.exit_codes import DONE
from distlora.system.progress import say
from distlora.training.compile_choice import decide_compile
from distlora.training.loop import mean_losses, prepare
from distlora.training.memory_meter import MemoryMeter, StepMemory
from distlora.training.objectives import objective_of
from distlora.training.optimizers import Optimizer, build_optimizer, learning_rate
from distlora.training.setup import start_run_model

STEPS = 2
"""Steps of the learning-rate schedule."""
DOCUMENTS = 4
"""Documents of equal length per sequence."""


def measure_step(trials: Sequence[Config], ranks: Ranks, *, in_slots: bool = False) -> StepMemory:
    """Return the memory of the second step of a run, or of trials trained together on one base (`in_slots`).

    The first step creates optimizer states, checks the base and teaches DeepSpeed the order. Every rank must call it
    alike.
    """
    steps = TrainingSteps(trials, ranks, in_slots=in_slots)
    meter = MemoryMeter(steps.model, *steps.optimizers)
    steps.run(0)
    steps.backend.settle_residency()
    steps.backend.zero_gradients()
    with meter.step():
        steps.run(1)
    if meter.memory is None:
        raise RuntimeError(f"the step was not measured: {meter.failure}")
    return meter.memory


class TrainingSteps:
    """A model with all trials in its slots, or with one run and no slots. Every rank makes one alike."""

    def __init__(self, trials: Sequence[Config], ranks: Ranks, *, in_slots: bool) -> None:
        self.trials, self.ranks = trials, ranks
        first = trials[0]
        require(
            first.train.needs.data != "prompts",
            f"train.objective={first.train.objective} trains on answers that a run samples, and this measures steps of "
            "random tokens; set train.objective=sft",
        )
        if in_slots:
            self.model, self.backend, _ = start_run_model(decide_compile(first, ranks)[0], ranks, for_slots=True)
            self.optimizers: list[Optimizer] = []
            for slot, trial in enumerate(trials):
                trained = put_trial(self.model, slot, trial.adapter, seed=trial.train.seed, device=ranks.device)
                self.backend.reduce_gradients_of(trained.values(), trial.parallel.bucket_mb)
                self.optimizers.append(build_optimizer(self.backend.updated(trained), trial.optim))
        else:
            run = Started.of(first, ranks)
            self.model, self.backend, self.optimizers = run.model, run.backend, [run.optimizer]
        vocabulary = self.model.vocabulary.rows
        self._batches = [self._step_batch(trial, vocabulary) for trial in trials]
        self._slots = range(len(trials)) if in_slots else [None]
        self._whole = first.train.accumulate == "block"
        self._objective = objective_of(first.train, first.rollout)
        self._ok = torch.ones((), dtype=torch.bool, device=ranks.device)
        self.model.set_num_micro(first.train.slices(ranks.world))

    def _step_batch(self, trial: Config, vocabulary: int) -> StepBatch:
        """Return this rank's part of a trial's step, in which every token is a target."""
        rows, length, world = trial.train.micro_batch, trial.data.sequence_length, self.ranks.world
        ids = random_tokens(rows * trial.train.accumulation(world), length, vocabulary, self.ranks.rank)
        positions = (torch.arange(length) % -(-length // DOCUMENTS)).expand_as(ids)
        labels = ids.roll(-1, dims=1)
        places = torch.arange(len(ids)) * world + self.ranks.rank
        split = (each.split(rows) for each in (ids, labels, positions, places))
        micro_batches = [MicroBatch(*parts) for parts in zip(*split, strict=True)]
        if trial.train.needs.data == "judged":
            micro_batches = [part._replace(judged=(part.position_ids == 0).long()) for part in micro_batches]
        counts = world * labels.numel(), world * int((positions == 0).sum()), world * len(ids)
        batch = StepBatch(micro_batches, *counts, tuple(places.tolist()))
        return replace(batch, mismatched=micro_batches) if trial.train.needs.mismatched else batch

    def run(self, number: int) -> None:
        """Run step `number` (0-based) of all trials."""
        backend, trials = self.backend, self.trials
        backend.zero_gradients()
        shares = [Share(batch, slot, number) for batch, slot in zip(self._batches, self._slots, strict=True)]
        units = [batch.global_targets for batch in self._batches]
        if prepare(self._objective, self.model, shares[0], units[0], backend, whole=self._whole):
            self.model.set_num_micro(trials[0].train.slices(self.ranks.world))
        parts = stacks(shares, whole=self._whole)
        for index, part in enumerate(parts):
            losses = self._objective.losses(self.model, part.batch, self.ranks.device, part.step)
            backend.backward(*mean_losses(part, losses.rows, units), last=index == len(parts) - 1)
        backend.finish_gradients()
        for gradients, trial in zip(backend.gradients, trials, strict=True):
            gradients.clip(trial.optim.max_grad_norm)
        for optimizer, trial in zip(self.optimizers, trials, strict=True):
            optimizer.step(learning_rate(number, STEPS, trial.optim), self._ok)


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

    def flat(self) -> dict[str, Any]:
        """Return the figures in bytes, by category where it is measured or planned."""
        values = dataclasses.asdict(self.cell) | {"part": self.part, "moment": self.moment}
        figures = {"held": self.held, "peak": self.peak}
        for kind in KINDS:
            if kind in self.measured or kind in self.planned:
                figures[kind] = self.measured.get(kind, 0), self.planned.get(kind, 0)
        for name, (measured, planned) in figures.items():
            values |= {f"{name}_measured": measured, f"{name}_planned": planned}
        return values


def rank_main(
    rank: int, world: int, port: int, folders: dict[str, Path], rank_cells: Sequence[Cell], results: Any
) -> None:
    """Measure every cell of this world size, on one rank."""
    set_rank(rank, world, port)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    ranks, rows = join_ranks(), []
    devices: tuple[tuple[str, int], ...] = ()
    if ranks.device.type == "cuda":
        devices = ((torch.cuda.get_device_name(), torch.cuda.mem_get_info(ranks.device)[1]),) * world
    here = LocalHardware(devices=devices)
    for cell in rank_cells:
        if rank == 0:
            say(f"{cell.model} on {world} ranks: {cell.backend}, {cell.checkpointing}")
        config = cell.config(folders[cell.model])
        step = measure_step([config], ranks)
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
        cell, worst = row.cell, row.worst
        cells = [cell.model, str(cell.ranks), "" if cell.ranks == 1 else cell.backend, cell.checkpointing]
        cells.append(cell.accumulate)
        for measured, planned in (row.held, row.peak):
            cells += [f"{measured / 1e6:,.1f}", f"{planned / 1e6:,.1f}", f"{planned / measured - 1:+.1%}"]
        cells.append(row.part if row.part == row.moment else f"{row.part}, planned {row.moment}")
        both = (f"{values.get(worst, 0) / 1e6:,.1f}" for values in (row.measured, row.planned))
        lines.append([*cells, f"{worst}: {', '.join(both)}"])
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
        rows=[row.flat() for row in rows],
        draw=lambda path: draw_bars("The memory of a training step", panels, path),
    )


def main(request: MemoryBench) -> int:
    """Run the worker: measure as the request says, and print."""
    with libraries_print_to_stderr():
        rows = list(measure(list(cells(request.models, request.ranks))))
    results(rows).show(out=None if request.out is None else Path(request.out), as_json=request.json)
    return DONE
