"""Training steps of a run alone and of a pack, as the trainer runs them, over rows of random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distlora.bench.rows import random_tokens
from distlora.config import Config
from distlora.data.loader import MicroBatch, StepBatch
from distlora.data.stacking import Share, stacks
from distlora.model.slots import put_trial
from distlora.parallel import Ranks, whole_shape
from distlora.training.loop import mean_losses
from distlora.training.objectives import objective_of
from distlora.training.optimizers import Optimizer, build_optimizer, learning_rate
from distlora.training.setup import start_adapters, start_model
from distlora.training.worker import trained_parameters

STEPS = 2
"""Of the schedule of the learning rate."""
DOCUMENTS = 4
"""Of each row, of one length."""


class PackStep:
    """A model with all of these trials in its slots; of one trial, without slots, as a run alone has it. Every rank
    makes one alike."""

    def __init__(self, trials: Sequence[Config], ranks: Ranks, *, in_slots: bool = True) -> None:
        assert in_slots or len(trials) == 1, "several trials need slots"
        self.trials, self.ranks = trials, ranks
        first = trials[0]
        self.model, self.backend, _ = start_model(first, ranks, for_slots=in_slots)
        self.optimizers: list[Optimizer] = []
        for slot, trial in enumerate(trials):
            if in_slots:
                trained = put_trial(self.model, slot, trial.adapter, seed=trial.train.seed, device=ranks.device)
            else:
                trained = trained_parameters(self.model)
            self.backend.reduce_gradients_of(trained.values(), trial.parallel.bucket_mb)
            self.optimizers.append(build_optimizer(self.backend.updated(trained), trial.optim))
        if not in_slots:
            start_adapters(self.model, first, self.backend, restores=False, say=lambda text: None)
        vocabulary = whole_shape(self.model.head.weight)[0]
        self._batches = [step_batch(trial, ranks, vocabulary) for trial in trials]
        self._slots = range(len(trials)) if in_slots else [None]
        self._whole = first.train.accumulate == "block"
        self._objective = objective_of(first.train)
        self._ok = torch.ones((), dtype=torch.bool, device=ranks.device)
        self.model.set_num_micro(first.slices(ranks.world))

    def run(self, number: int) -> None:
        """One step of all trials, `number` of STEPS."""
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


def step_batch(config: Config, ranks: Ranks, vocabulary: int) -> StepBatch:
    """This rank's share of a trial's step, whose rows are all full: its loss is the mean over their tokens, with DPO
    too."""
    rows, length, world = config.train.micro_batch, config.data.sequence_length, ranks.world
    ids = random_tokens(rows * config.accumulation(world), length, vocabulary, ranks.rank)
    positions = (torch.arange(length) % -(-length // DOCUMENTS)).expand_as(ids)
    labels = ids.roll(-1, dims=1)
    places = torch.arange(len(ids)) * world + ranks.rank
    cut = (each.split(rows) for each in (ids, labels, positions, places))
    micro_batches = [MicroBatch(*parts) for parts in zip(*cut, strict=True)]
    return StepBatch(micro_batches, world * labels.numel(), 0, world * len(ids), tuple(places.tolist()))
