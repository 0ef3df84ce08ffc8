"""One training step of ours and of the peers on this rank, its collectives counted as torch issues them.

The peers are PEFT adapters on a base that accelerate's FSDP2 shards: 4-bit by bitsandbytes with either storage, and
bf16; peer_models.py says how it is one on a CPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distlora.bench.collectives import counted
from distlora.bench.network import loopback_bytes
from distlora.bench.peer_models import describe, fsdp2_accelerator, load_base
from distlora.config import Config
from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks
from distlora.parallel.traffic import Traffic
from distlora.planner.traffic import Storage
from distlora.training.setup import start_model


@dataclass(frozen=True, slots=True)
class Counts:
    """What a step carried on one rank, in bytes."""

    gathered: int
    scattered: int
    reduced: int
    calls: int
    """Collectives."""
    loopback: int
    """What came in over this machine's loopback interface meanwhile, for all ranks and whoever else uses it."""

    @classmethod
    def of(cls, step: Callable[[], object], ranks: Ranks) -> Counts:
        """Run a step, between barriers, and count it."""
        assert ranks.group is not None
        dist.barrier(ranks.group)
        before = loopback_bytes()
        collectives = counted(step)
        dist.barrier(ranks.group)
        received = loopback_bytes() - before
        assert collectives.of("broadcast") == 0, "a step broadcasts nothing"
        gathered, scattered, reduced = (collectives.of(kind) for kind in ("gathered", "scattered", "reduced"))
        return cls(gathered, scattered, reduced, sum(collectives.calls.values()), received)


def random_tokens(rows: int, length: int, vocabulary: int, rank: int) -> Tensor:
    """(rows, length) int64, the rank's own."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(rank))


def measure_ours(config: Config, ranks: Ranks, *, accumulation: int) -> tuple[Counts, Traffic]:
    """The second step of a run with these settings: counted as torch issues it, and by the backend itself."""
    model, backend, _ = start_model(config, ranks)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backend.reduce_gradients_of(trained, config.parallel.bucket_mb)

    def step() -> None:
        our_step(model, backend, config, accumulation)

    step()  # Its first forward checks what was gathered of the base, which ends with a sum over the ranks.
    backend.zero_gradients()
    backend.traffic.take()
    return Counts.of(step, ranks), backend.traffic.take()


def our_step(model: CausalLM, backend: Backend, config: Config, accumulation: int) -> None:
    """Forward, backward and the sum of gradients over random tokens, as the trainer runs them."""
    rows, in_block = config.train.micro_batch, config.train.accumulate == "block"
    vocabulary, length = model.head.weight.shape[0], config.data.sequence_length
    ids = random_tokens(rows * accumulation, length, vocabulary, backend.ranks.rank).to(backend.ranks.device)
    model.set_num_micro(accumulation if in_block else 1)
    parts = [ids] if in_block else list(ids.split(rows))
    for index, part in enumerate(parts):
        positions = torch.arange(length).expand_as(part)
        documents = Documents.of(positions).to(part.device) if model.attends_by_documents else None
        losses = model(part, positions.to(part.device), part, documents=documents)
        loss = losses.sum() / (ids.numel() * backend.ranks.world)
        backend.backward(loss, last=index == len(parts) - 1)
    backend.finish_gradients()
    for gradients in backend.gradients:
        gradients.clip(config.optim.max_grad_norm)


def measure_peer(
    folder: Path, ranks: Ranks, storage: Storage, *, r: int, length: int, accumulation: int
) -> tuple[Counts, str]:
    """The second step of PEFT and accelerate's FSDP2 on the Llama in `folder`, with an adapter on every linear; and
    what became of the model, in words."""
    accelerator, model, optimizer = prepare_peer(folder, storage, r=r)

    def step() -> None:
        peer_step(accelerator, model, optimizer, length=length, accumulation=accumulation, rank=ranks.rank)

    step()
    optimizer.zero_grad()
    return Counts.of(step, ranks), describe(model)


def prepare_peer(folder: Path, storage: Storage, *, r: int) -> tuple[Any, Any, Any]:
    """(accelerator, model, optimizer) as a user of the three libraries has them, but for the device check."""
    from peft import LoraConfig, get_peft_model

    accelerator = fsdp2_accelerator(forced=True)
    base = load_base(folder, storage)
    model: Any = get_peft_model(base, LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    with warnings.catch_warnings():  # That 4-bit weights in uint8 are left out of the sharding, which the table shows.
        warnings.simplefilter("ignore")
        model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def peer_step(accelerator: Any, model: Any, optimizer: Any, *, length: int, accumulation: int, rank: int) -> None:
    """accelerate's loop with gradient accumulation, up to the update."""
    ids = random_tokens(accumulation, length, model.config.vocab_size, rank)
    for index in range(accumulation):
        row = ids[index : index + 1]
        last = index == accumulation - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            accelerator.backward(model(input_ids=row, labels=row).loss / accumulation)
