"""Run and measure training steps of random tokens: real weights, shards and adapters, without a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distlora.config import Config
from distlora.data.loader import MicroBatch, StepBatch
from distlora.model.trial_slots import put_trial
from distlora.parallel import Ranks
from distlora.parallel.watch import Control
from distlora.training.compile_choice import decide_compile
from distlora.training.loop import Passes
from distlora.training.memory_meter import MemoryMeter, StepMemory
from distlora.training.multi_trial.stacks import stacks
from distlora.training.objectives import objective_of
from distlora.training.optimizers import Optimizer, build_optimizer, learning_rate
from distlora.training.setup import StartOptions, start_run_model
from support.measured import Started, random_tokens

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
        if in_slots:
            self.model, self.backend, _ = start_run_model(
                decide_compile(first, ranks)[0], ranks, StartOptions(for_slots=True)
            )
            self.optimizers: list[Optimizer] = []
            for slot, trial in enumerate(trials):
                trained = put_trial(self.model, slot, trial.adapter, seed=trial.train.seed, device=ranks.device)
                self.backend.reduce_gradients_of(trained.values(), trial.parallel.bucket_mb)
                self.optimizers.append(build_optimizer(self.backend.updated(trained), trial.optim))
        else:
            run = Started.of(first, ranks)
            self.model, self.backend, self.optimizers = run.model, run.backend, [run.optimizer]
        vocabulary = self.model.vocabulary.rows
        self._in_slots = in_slots
        self._batches = [self._step_batch(trial, vocabulary, slot) for slot, trial in enumerate(trials)]
        self._whole = first.train.accumulate == "block"
        self._objective = objective_of(first.train, first.rollout)
        control = Control(ranks.control, save_minutes=None)
        self._passes = Passes(self.model, self.backend, control, one_adapter=not in_slots)
        self._ok = torch.ones((), dtype=torch.bool, device=ranks.device)
        self.model.set_num_micro(first.train.slices(ranks.world))

    def _step_batch(self, trial: Config, vocabulary: int, slot: int) -> StepBatch:
        """Return this rank's part of a trial's step, in which every token is a target."""
        rows, length, world = trial.train.micro_batch, trial.data.sequence_length, self.ranks.world
        ids = random_tokens(rows * trial.train.accumulation(world), length, vocabulary, self.ranks.rank)
        positions = (torch.arange(length) % -(-length // DOCUMENTS)).expand_as(ids)
        labels = ids.roll(-1, dims=1)
        places = torch.arange(len(ids)) * world + self.ranks.rank
        split = (each.split(rows) for each in (ids, labels, positions, places))
        micro_batches = [MicroBatch(*parts) for parts in zip(*split, strict=True)]
        if self._in_slots:
            micro_batches = [part._replace(slots=torch.full((len(part.rows),), slot)) for part in micro_batches]
        if trial.train.needs.data == "judged":
            micro_batches = [part._replace(judged=(part.position_ids == 0).long()) for part in micro_batches]
        counts = world * labels.numel(), world * int((positions == 0).sum()), world * len(ids)
        batch = StepBatch(micro_batches, *counts, tuple(places.tolist()))
        return replace(batch, mismatched=micro_batches) if trial.train.needs.mismatched else batch

    def run(self, number: int) -> None:
        """Run step `number` (0-based) of all trials."""
        backend, trials = self.backend, self.trials
        backend.zero_gradients()
        units = [batch.global_targets for batch in self._batches]
        if self._in_slots:
            parts = stacks(self._batches, [number] * len(self._batches), whole=self._whole)
            steps = [(part.batch, part.steps) for part in parts]
            self._passes.backward(
                self._objective, steps, lambda index, rows: parts[index].mean_losses(rows, units), number
            )
        else:
            self._passes.of_trial(self._objective, self._batches[0], units[0], number, whole=self._whole)
        for gradients, trial in zip(backend.gradients, trials, strict=True):
            gradients.clip(trial.optim.max_grad_norm)
        for optimizer, trial in zip(self.optimizers, trials, strict=True):
            optimizer.step(learning_rate(number, STEPS, trial.optim), self._ok)
