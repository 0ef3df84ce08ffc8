"""Compare the calculated memory of a pack with that of ranks, in the bounds of test_plan_memory.py.

What stays is exact to the byte, the peak of a step within 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distlora.bench.memory import measure_step
from distlora.config import Config
from distlora.parallel import Ranks
from distlora.planner.memory.device import device_bytes
from distlora.planner.model import model_in
from distlora.planner.workload import Workload, trained_together
from distlora.training.memory_meter import StepMemory
from support.plan_inputs import cpu_machine
from support.plan_memory_runs import Settings, check, config_of
from support.tiers import ci
from support.worlds import World

NONE = {"method": "none"}
DIFFERENT: list[Settings] = [
    {"adapter": {"r": 4}},
    {"adapter": {"r": 24, "target_modules": "mlp", "lora_dropout": 0.1}, "optim": {"lr": 1e-3}},
    {"adapter": {"r": 9, "target_modules": r".*layers\.[12]\..*_proj"}},
]
CELLS: list[Any] = [
    # (ranks, micro-batches, trials)
    (1, 1, [{}] * 2),
    ci(2, 2, [{"quant": NONE, "train": {"accumulate": "block"}}] * 4),
    ci(3, 1, DIFFERENT),
    (1, 1, [{"train": {"checkpointing": "none"}, "adapter": {"r": 64}}] * 2),
]
MORE: list[tuple[int, int, list[Settings]]] = [
    (1, 1, [{}]),
    (1, 1, [{}] * 4),
    (4, 1, [{"parallel": {"shard_degree": 2}}] * 4),
    (2, 1, [{"adapter": {"use_dora": True}}] * 2),
    (2, 1, [{"optim": {"name": "adamw_8bit"}, "adapter": {"r": 64}}] * 3),
    (2, 3, [{"train": {"checkpointing": "selective"}}] * 2),
    (2, 1, [{"train": {"checkpointing": "offload"}}] * 2),
    (2, 1, [{"parallel": {"resident_blocks": 2}}] * 2),
]


def measured(ranks: Ranks, *, trials: Sequence[Config]) -> StepMemory:
    return measure_step(trials, ranks, in_slots=True)


@pytest.mark.parametrize(
    ("size", "accumulation", "settings"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE)]
)
def test_trials_together_have_the_planned_memory(
    world: World, folders: Path, size: int, accumulation: int, settings: list[Settings]
) -> None:
    folder = folders / "llama"
    trials = [config_of(folder, size, own, accumulation) for own in settings]
    most, *_ = world.run(size, measured, trials=trials)
    together = trained_together([Workload.of(trial) for trial in trials])
    check(device_bytes(together, model_in(folder), cpu_machine(size)), most)
