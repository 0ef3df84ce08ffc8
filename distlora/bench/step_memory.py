"""The memory of one training step on this rank, measured by kind (`distlora.memory_meter`), over random tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from distlora.bench.traffic import random_tokens
from distlora.config import Config
from distlora.data.loader import MicroBatch, StepBatch
from distlora.data.stacking import Share, stacks
from distlora.memory_meter import MemoryMeter, StepMemory
from distlora.objectives import objective_of
from distlora.optim import Optimizer, build_optimizer, learning_rate
from distlora.parallel import Backend, Ranks, whole_shape
from distlora.slots import put_trial
from distlora.startup import start_adapters, start_model
from distlora.trainer import mean_losses

STEPS = 2
"""The first makes the optimizer's state, checks the base and shows DeepSpeed the order of units; the last is measured.
"""


def measure_step(config: Config, ranks: Ranks, *, documents: int = 4) -> StepMemory:
    """The second step of a run with these settings, as the trainer runs it, over rows of random tokens, each of which
    has so many documents of one length. Every rank must call it alike."""
    model, backend, _ = start_model(config, ranks)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    optimizer = build_optimizer(backend.updated(trained), config.optim)
    start_adapters(model, config, backend, restores=False, say=lambda text: None)
    meter = MemoryMeter(model, optimizer)
    objective, ok = objective_of(config.train), torch.ones((), dtype=torch.bool, device=ranks.device)
    micro_batches = _micro_batches(config, ranks, whole_shape(model.head.weight)[0], documents)
    model.set_num_micro(config.slices(ranks.world))
    # Tokens, or pairs of documents.
    units = ranks.world * sum(batch.labels.numel() for batch in micro_batches)

    def step(number: int) -> None:
        backend.zero_gradients()
        for index, batch in enumerate(micro_batches):
            losses = objective.losses(model, batch, ranks.device, number)
            backend.backward(losses.rows.sum() / units, last=index == len(micro_batches) - 1)
        backend.finish_gradients()
        for gradients in backend.gradients:
            gradients.clip(config.optim.max_grad_norm)
        optimizer.step(learning_rate(number, STEPS, config.optim), ok)

    return _second(step, backend, meter)


def measure_pack(trials: Sequence[Config], ranks: Ranks, *, documents: int = 4) -> StepMemory:
    """The second step of a pack with all of these trials in it (distlora.packed.pack), over rows as `measure_step` has
    them. Every rank must call it alike."""
    first = trials[0]
    model, backend, _ = start_model(first, ranks, for_slots=True)
    optimizers: list[Optimizer] = []
    for slot, trial in enumerate(trials):
        trained = put_trial(model, slot, trial.adapter, seed=trial.train.seed, device=ranks.device)
        backend.reduce_gradients_of(trained.values(), trial.parallel.bucket_mb)
        optimizers.append(build_optimizer(backend.updated(trained), trial.optim))
    meter = MemoryMeter(model, *optimizers)
    objective, ok = objective_of(first.train), torch.ones((), dtype=torch.bool, device=ranks.device)
    vocabulary, whole = whole_shape(model.head.weight)[0], first.train.accumulate == "block"
    batches = [_step_batch(_own_micro_batches(trial, ranks, vocabulary, documents)) for trial in trials]
    model.set_num_micro(len(batches[0].micro_batches) if whole else 1)
    units = [ranks.world * batch.global_targets for batch in batches]

    def step(number: int) -> None:
        backend.zero_gradients()
        parts = stacks([Share(batch, slot, number) for slot, batch in enumerate(batches)], whole=whole)
        for index, part in enumerate(parts):
            losses = objective.losses(model, part.batch, ranks.device, part.step)
            means = mean_losses(part, losses.rows, units)
            backend.backward(*means, last=index == len(parts) - 1)
        backend.finish_gradients()
        for gradients, trial in zip(backend.gradients, trials, strict=True):
            gradients.clip(trial.optim.max_grad_norm)
        for optimizer, trial in zip(optimizers, trials, strict=True):
            optimizer.step(learning_rate(number, STEPS, trial.optim), ok)

    return _second(step, backend, meter)


def _second(step: Callable[[int], None], backend: Backend, meter: MemoryMeter) -> StepMemory:
    """What the second of two steps has."""
    step(0)
    backend.settle_residency()
    backend.zero_gradients()
    with meter.step():
        step(1)
    if meter.found is None:
        raise RuntimeError(f"the step was not measured: {meter.failure}")
    return meter.found


def _step_batch(micro_batches: list[MicroBatch]) -> StepBatch:
    """This rank's share of a step whose rows are all full."""
    rows = torch.cat([batch.rows for batch in micro_batches])
    targets = sum(batch.labels.numel() for batch in micro_batches)
    return StepBatch(micro_batches, targets, 0, len(rows), tuple(rows.tolist()))


def _own_micro_batches(config: Config, ranks: Ranks, vocabulary: int, documents: int) -> list[MicroBatch]:
    """Of one trial, one by one: a pack stacks them with those of the others."""
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate="step"))
    return _micro_batches(alone, ranks, vocabulary, documents)


def _micro_batches(config: Config, ranks: Ranks, vocabulary: int, documents: int) -> list[MicroBatch]:
    """As the trainer hands them to the model: one of all rows with train.accumulate=block."""
    rows, length = config.train.micro_batch, config.data.sequence_length
    number = config.accumulation(ranks.world)
    ids = random_tokens(rows * number, length, vocabulary, ranks.rank)
    positions = (torch.arange(length) % -(-length // documents)).expand_as(ids)
    labels = ids.roll(-1, dims=1)
    size = rows * config.slices(ranks.world)
    places = torch.arange(len(ids)) * ranks.world + ranks.rank
    cut = (each.split(size) for each in (ids, labels, positions, places))
    return [MicroBatch(*parts) for parts in zip(*cut, strict=True)]
