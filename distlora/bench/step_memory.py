"""The memory of one training step on this rank, measured by kind (`distlora.training.memory_meter`), over random
tokens."""

from __future__ import annotations

from collections.abc import Sequence

from distlora.bench.pack_step import PackStep
from distlora.config import Config
from distlora.parallel import Ranks
from distlora.training.memory_meter import MemoryMeter, StepMemory


def measure_step(config: Config, ranks: Ranks) -> StepMemory:
    """The second step of a run with these settings. Every rank must call it alike."""
    return _second(PackStep([config], ranks, in_slots=False))


def measure_pack(trials: Sequence[Config], ranks: Ranks) -> StepMemory:
    """The same of a pack with all of these trials in it (distlora.training.multi_trial.pack)."""
    return _second(PackStep(trials, ranks))


def _second(steps: PackStep) -> StepMemory:
    """What the second of two steps has: the first makes the optimizers' state, checks the base and shows DeepSpeed the
    order of units."""
    meter = MemoryMeter(steps.model, *steps.optimizers)
    steps.run(0)
    steps.backend.settle_residency()
    steps.backend.zero_gradients()
    with meter.step():
        steps.run(1)
    if meter.found is None:
        raise RuntimeError(f"the step was not measured: {meter.failure}")
    return meter.found
