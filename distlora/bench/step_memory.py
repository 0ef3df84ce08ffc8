"""The memory of one training step on this rank, measured by kind (`distlora.memory_meter`), over random tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from distlora.bench.pack_step import STEPS, PackStep, micro_batches_of
from distlora.config import Config
from distlora.memory_meter import MemoryMeter, StepMemory
from distlora.objectives import objective_of
from distlora.optim import build_optimizer, learning_rate
from distlora.parallel import Backend, Ranks, whole_shape
from distlora.startup import start_adapters, start_model


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
    micro_batches = micro_batches_of(config, ranks, whole_shape(model.head.weight)[0], documents)
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
    pack = PackStep(trials, ranks, documents=documents)
    return _second(pack.run, pack.backend, MemoryMeter(pack.model, *pack.optimizers))


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
