"""Run one training step on this rank and count its collectives as torch issues them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from distlora.config import Config
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks
from distlora.parallel.ranks import Traffic
from distlora.system import process_memory
from distlora.training.setup import start_run_model
from support.collectives import Collectives
from support.measured import random_tokens


@dataclass(frozen=True, slots=True)
class Counts:
    """Network traffic of one step on one rank, in bytes."""

    gathered: int
    scattered: int
    reduced: int
    calls: int
    """Number of collectives."""

    @classmethod
    def of(cls, step: Callable[[], object], ranks: Ranks) -> Counts:
        """Run a step between barriers and count its collectives."""
        assert ranks.group is not None
        dist.barrier(ranks.group)
        with Collectives() as collectives:
            step()
        dist.barrier(ranks.group)
        assert collectives.of("broadcast") == 0, "a step broadcasts nothing"
        gathered, scattered, reduced = (collectives.of(kind) for kind in ("gathered", "scattered", "reduced"))
        return cls(gathered, scattered, reduced, sum(collectives.calls.values()))


@contextlib.contextmanager
def only_collectives(*, here: bool = True) -> Iterator[None]:
    """Gather frozen units by collectives, as on several nodes. `here`: on this rank."""
    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(process_memory, "read", lambda *_: False)
        yield


def measure_ours(config: Config, ranks: Ranks, *, accumulation: int) -> tuple[Counts, Traffic]:
    """Return the traffic of the second step, counted as torch issues it and as the backend reports it."""
    model, backend, _ = start_run_model(config, ranks)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backend.reduce_gradients_of(trained, config.parallel.bucket_mb)

    def step() -> None:
        our_step(model, backend, config, accumulation)

    step()  # Its first forward checks what was gathered of the base, which ends with a sum over the ranks.
    backend.zero_gradients()
    backend.traffic.take()
    return Counts.of(step, ranks), backend.traffic.take()


def our_step(model: CausalLM, backend: Backend, config: Config, accumulation: int) -> None:
    """Run forward, backward and the gradient reduction over random tokens, as the trainer does."""
    rows, in_block = config.train.micro_batch, config.train.accumulate == "block"
    vocabulary, length = model.vocabulary.rows, config.data.sequence_length
    ids = random_tokens(rows * accumulation, length, vocabulary, backend.ranks.rank).to(backend.ranks.device)
    model.set_num_micro(accumulation if in_block else 1)
    parts = [ids] if in_block else list(ids.split(rows))
    for index, part in enumerate(parts):
        positions = torch.arange(length).expand_as(part)
        documents = model.documents_of(positions, part.device)
        losses = model(part, positions.to(part.device), part, documents=documents)
        loss = losses.sum() / (ids.numel() * backend.ranks.world)
        backend.backward(loss, last=index == len(parts) - 1)
    backend.finish_gradients()
    for gradients in backend.gradients:
        gradients.clip(config.optim.max_grad_norm)


def our_traffic(ranks: Ranks, *, config: Config, accumulation: int) -> tuple[Counts, Traffic]:
    with only_collectives():
        return measure_ours(config, ranks, accumulation=accumulation)
