"""Run training steps of one run or of trials trained together over random tokens, and measure their memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distlora.bench.random_inputs import random_tokens
from distlora.config import Config
from distlora.data.loader import MicroBatch, Share, StepBatch, stacks
from distlora.model.build import put_trial
from distlora.parallel import Ranks, whole_shape
from distlora.training.loop import mean_losses
from distlora.training.memory_meter import MemoryMeter, StepMemory
from distlora.training.objectives import objective_of
from distlora.training.optimizers import Optimizer, build_optimizer, learning_rate
from distlora.training.setup import start_adapters, start_run_model
from distlora.training.worker import trained_parameters

STEPS = 2
"""Steps of the learning-rate schedule."""
DOCUMENTS = 4
"""Documents of equal length per sequence."""


def measure_step(config: Config, ranks: Ranks) -> StepMemory:
    """Return the memory of the second step of a run. Every rank must call it alike."""
    return _measure_second(TrainingSteps([config], ranks, in_slots=False))


def measure_pack(trials: Sequence[Config], ranks: Ranks) -> StepMemory:
    """Return the memory of the second step of trials trained together on one base."""
    return _measure_second(TrainingSteps(trials, ranks))


def _measure_second(steps: TrainingSteps) -> StepMemory:
    """Measure the second step: the first creates optimizer states, checks the base and teaches DeepSpeed the order."""
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

    def __init__(self, trials: Sequence[Config], ranks: Ranks, *, in_slots: bool = True) -> None:
        assert in_slots or len(trials) == 1, "several trials need slots"
        self.trials, self.ranks = trials, ranks
        first = trials[0]
        self.model, self.backend, _ = start_run_model(first, ranks, for_slots=in_slots)
        self.optimizers: list[Optimizer] = []
        for slot, trial in enumerate(trials):
            if in_slots:
                trained = put_trial(self.model, slot, trial.adapter, seed=trial.train.seed, device=ranks.device)
            else:
                trained = trained_parameters(self.model)
            self.backend.reduce_gradients_of(trained.values(), trial.parallel.bucket_mb)
            self.optimizers.append(build_optimizer(self.backend.updated(trained), trial.optim))
        if not in_slots:
            start_adapters(
                self.model,
                first.spec,
                self.backend,
                objective=first.train.objective,
                restores=False,
                log=lambda text: None,
            )
        vocabulary = whole_shape(self.model.head.weight)[0]
        self._batches = [self._step_batch(trial, vocabulary) for trial in trials]
        self._slots = range(len(trials)) if in_slots else [None]
        self._whole = first.train.accumulate == "block"
        self._objective = objective_of(first.train)
        self._ok = torch.ones((), dtype=torch.bool, device=ranks.device)
        self.model.set_num_micro(first.slices(ranks.world))

    def _step_batch(self, trial: Config, vocabulary: int) -> StepBatch:
        """Return this rank's part of a trial's step, in which every token is a target."""
        rows, length, world = trial.train.micro_batch, trial.data.sequence_length, self.ranks.world
        ids = random_tokens(rows * trial.accumulation(world), length, vocabulary, self.ranks.rank)
        positions = (torch.arange(length) % -(-length // DOCUMENTS)).expand_as(ids)
        labels = ids.roll(-1, dims=1)
        places = torch.arange(len(ids)) * world + self.ranks.rank
        split = (each.split(rows) for each in (ids, labels, positions, places))
        micro_batches = [MicroBatch(*parts) for parts in zip(*split, strict=True)]
        return StepBatch(micro_batches, world * labels.numel(), 0, world * len(ids), tuple(places.tolist()))

    def run(self, number: int) -> None:
        """Run step `number` (0-based) of all trials."""
        backend, trials = self.backend, self.trials
        backend.zero_gradients()
        shares = [Share(batch, slot, number) for batch, slot in zip(self._batches, self._slots, strict=True)]
        units = [batch.global_targets for batch in self._batches]
        parts = stacks(shares, whole=self._whole)
        for index, part in enumerate(parts):
            losses = self._objective.losses(self.model, part.batch, self.ranks.device, part.step)
            backend.backward(*mean_losses(part, losses.rows, units), last=index == len(parts) - 1)
        backend.finish_gradients()
        for gradients, trial in zip(backend.gradients, trials, strict=True):
            gradients.clip(trial.optim.max_grad_norm)
        for optimizer, trial in zip(self.optimizers, trials, strict=True):
            optimizer.step(learning_rate(number, STEPS, trial.optim), self._ok)
