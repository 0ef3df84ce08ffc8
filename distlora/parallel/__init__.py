"""Shard a model over ranks and reduce its gradients.

`parallelize` is the only function that knows about ranks. Model files never import torch.distributed, and the trainer
does not know which backend it has. Both see `Backend` only.
"""

from __future__ import annotations

from distlora.config import ParallelConfig
from distlora.config.deepspeed_file import read_gathering
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.parallel import fsdp2
from distlora.parallel.backend import Backend
from distlora.parallel.expert_parallel import divide_experts
from distlora.parallel.fsdp2 import ComputeCopies, Residency
from distlora.parallel.gradients import Gradients
from distlora.parallel.ranks import (
    Ranks,
    Shards,
    from_rank_0,
    join_ranks,
    leave_ranks,
    max_over_ranks,
    sum_over_ranks,
    whole_shape,
)

__all__ = [
    "Backend",
    "Gradients",
    "Ranks",
    "Shards",
    "from_rank_0",
    "join_ranks",
    "leave_ranks",
    "max_over_ranks",
    "parallelize",
    "sum_over_ranks",
    "whole_shape",
]


def parallelize(
    model: CausalLM, ranks: Ranks, parallel: ParallelConfig | None = None, *, shard_degree: int | None = None
) -> Backend:
    """Shard all of `model` (on meta) except its adapters, and allocate its memory on the device without filling it.

    `shard_degree`: ranks per replica of the base (Config.shard_degree); None: all ranks. Raises UserError, on every
    rank, if a node lacks host memory for an offloaded base, or the model has fewer layers than stay gathered.
    """
    parallel = parallel or ParallelConfig()
    backend = Backend(ranks, Shards.over(ranks, shard_degree or ranks.world), _root=model)
    prefetch, traffic = parallel.prefetch, backend.traffic
    if backend.sharded and parallel.backend == "zero3":
        # Imported late, because it imports DeepSpeed.
        from distlora.parallel import zero3

        gathering = read_gathering(parallel)
        if gathering.offload:
            file = parallel.deepspeed_config
            backend.require_host_memory(
                zero3.host_bytes(model, backend.shards),
                "parallel.offload_base=true" if parallel.offload_base else f"offload_param in {file}",
                "each process's shard of the base",
                "leave it out, or shard the base over more nodes",
            )
        units = zero3.shard(model, backend.shards, gathering, device=ranks.device, traffic=traffic)
        backend.after_backward = units.end_backward
    elif backend.sharded:
        if parallel.expert_degree != 1:
            required = parallel.expert_degree != "replica"  # The ranks of a resume may be others.
            divide_experts(model, backend.shards, ranks.device.type, traffic, required=required)
        fsdp2.shard(model, backend.shards, ranks.device, prefetch=prefetch, traffic=traffic)
        count, backend.residency = parallel.resident_blocks, Residency(model.blocks, backend.shards, ranks.device)
        # A layer with a dense copy of its weights is not gathered again.
        dense = sum(block.dense_dtype is not None for block in model.blocks)
        backend.residency.keep(dense if isinstance(count, str) else max(count, dense))
        backend.residency.waits = isinstance(count, str)
        if backend.residency.count > 0:
            model.notes.append(backend.residency.describe())
    elif model.compute_dtype is not None:
        adapters = set(adapter_parameters(model).values())
        # Recomputation runs a layer's inner module alone, one slice at a time. Without recomputation, backward keeps
        # the copies: one for all slices.
        blocks = (block.inner if block.checkpointing else block for block in model.blocks)
        for module in (model.embedding, *blocks, model.head):
            ComputeCopies(module, model.compute_dtype, ignored=adapters)
        ComputeCopies(model.decoder, model.compute_dtype, ignored={*model.parameters()} - {*model.rest()})
    model.to_empty(device=ranks.device)
    model.tie()
    return backend
