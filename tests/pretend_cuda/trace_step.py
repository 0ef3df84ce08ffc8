"""Trace a training step of a model of any size on the pretended GPU: bytes, launches and host waits, beside the plan.

    PRETEND_CUDA=shapes python -m pretend_cuda.start trace_step OUT.json CELL

CELL is JSON: {"model": a short name of plan_inputs.py, "layers": number (default: all), "config": more of config.json,
"ranks": number, "tokens": per rank and step, "settings": by section}. Operators give shapes only and large blocks are
addresses without memory, so 70B fits any machine. The step is the trainer's own, its second; the base has no values;
collectives are torch's fakes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distlora import derive
from distlora.architecture import spec
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.kept_weights import expected_headers
from distlora.architecture.shapes import ARCHITECTURES, shapes_of
from distlora.config import Config
from distlora.loading.load_base import Loaded
from distlora.parallel import Ranks
from distlora.planner.memory.device import device_bytes
from distlora.planner.model import built_in
from distlora.planner.workload import Workload
from distlora.system import host_memory
from distlora.training import setup
from distlora.training.loop import Trainer
from pretend_cuda import device, launches
from support.measured import Started, random_rows
from support.plan_inputs import MODELS, machine_of, timed_config

RANK = 3
"""Of several; its shard is as large as any."""


def load_nothing(*arguments: Any, **options: Any) -> Loaded:
    """Leave the allocated base without values, in place of load_base."""
    return Loaded(seconds=0.0, bytes_read=0, quantized_weights=1, quantized_bytes=1, prequantized=False)


def ranks_of(world: int) -> Ranks:
    """Return one rank, or rank RANK of several in torch's fake process group."""
    if world == 1:
        return Ranks(0, 1, torch.device("cuda", 0), None)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["LOCAL_RANK"] = str(RANK)
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=world)
    return Ranks(RANK, world, torch.device("cuda", RANK), dist.group.WORLD, control=dist.group.WORLD)


def shapes_of_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a cell's model."""
    shapes = ARCHITECTURES[MODELS[cell["model"]]]
    return {**shapes, "num_hidden_layers": cell.get("layers", shapes["num_hidden_layers"]), **cell.get("config", {})}


def started(folder: Path, cell: dict[str, Any]) -> tuple[Config, Trainer]:
    """Return the config and the trainer of a cell before its first step. Its sequences are one document each."""
    world, tokens, settings = cell["ranks"], cell["tokens"], cell.get("settings", {})
    (folder / "config.json").write_text(json.dumps(shapes_of_cell(cell)))
    sections = {
        "model": {"path": str(folder)},
        "data": {"sequence_length": tokens},
        "adapter": {"r": 16},
        "quant": {"cache": False, **settings.get("quant", {})},
        "train": {"micro_batch": 1, "global_batch": world, "max_steps": 3, **settings.get("train", {})},
        "parallel": settings.get("parallel", {}),
    }
    ranks = ranks_of(world)
    torch.cuda.set_device(ranks.device)
    run = Started.of(timed_config(world, **sections), ranks)
    return run.config, run.trainer(random_rows(3 * world, tokens, run.model.vocabulary.rows))[0]


def seen_in_step(trainer: Trainer) -> dict[str, Any]:
    """Run a step, and return its launches, operators and host waits."""
    with device.recording():
        trainer._train_step()
    operators = Counter(torch.ops.pretend_cuda.take_counts()) + device.python_operators
    return {
        "layers": len(trainer.model.blocks),
        "kernels": dict(Counter(each.kernel for each in launches.recorded)),
        "variants": sorted({f"{each.kernel} {each.variant}" for each in launches.recorded}),
        "operators": {name.removeprefix("aten::"): count for name, count in operators.items()},
        "waits": dict(device.host_waits),
    }


def traced(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what a cell's second step allocates, what the plan says, and what its third step launches."""
    setup.load_base = load_nothing
    settings = shapes_of_cell(cell)
    if "quantization_config" in settings:
        headers = expected_headers(shapes_of(settings, "").architecture, settings, "")
        CheckpointFiles.headers = property(lambda files: headers)  # type: ignore[assignment]
    host_memory.available_bytes = lambda: None  # Blocks of the host are addresses too: no memory is taken.
    with tempfile.TemporaryDirectory() as folder:
        config, trainer = started(Path(folder), cell)
        gpu = trainer.backend.ranks.device
        trainer._train_step()
        trainer.backend.settle_residency()
        trainer.backend.zero_gradients()
        torch.cuda.reset_peak_memory_stats(gpu)
        persistent = torch.cuda.memory_allocated(gpu)
        trainer._train_step()
        peak = torch.cuda.max_memory_allocated(gpu)
        model = built_in(cell["model"], settings)
        plan = device_bytes(Workload.of(config), model, machine_of("h100", ranks=cell["ranks"]))
        bytes_ = {"persistent": [persistent, plan.persistent], "peak": [peak, plan.peak], "worst": plan.worst}
        trainer.backend.zero_gradients()
        return bytes_ | seen_in_step(trainer)


def main(trace: Callable[[Any], Any] = traced, description: str | None = __doc__) -> None:
    """Write what `trace` finds in the cell of the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("cell", type=json.loads)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec.derive = derive.derive  # In this process: one of its own takes seconds.
    options.out.write_text(json.dumps(trace(options.cell), indent=1))
