"""Sharding and gradient reduction: `parallelize` is the one place that knows about ranks.

Model files never import torch.distributed, and the trainer never asks which backend it has: what both may see is
`Backend`.
"""

from __future__ import annotations

from distlora.adapters import adapter_parameters
from distlora.config import Config
from distlora.model import CausalLM
from distlora.parallel import fsdp2
from distlora.parallel.backend import Backend
from distlora.parallel.compute_copies import ComputeCopies
from distlora.parallel.ranks import Ranks, from_rank_0, join_ranks, leave_ranks
from distlora.parallel.shards import Shards

__all__ = ["Backend", "Ranks", "Shards", "from_rank_0", "join_ranks", "leave_ranks", "parallelize"]


def parallelize(model: CausalLM, ranks: Ranks, config: Config) -> Backend:
    """Shard `model` (on meta) as the config says, all but its adapters, and give its memory to the device, unfilled."""
    backend = Backend(ranks, Shards.over(ranks, config.shard_degree(ranks.world)), _root=model)
    if backend.sharded:
        prefetch, traffic = config.parallel.prefetch, backend.traffic
        fsdp2.shard(model, backend.shards, ranks.device, prefetch=prefetch, traffic=traffic)
    elif model.compute_dtype is not None:
        adapters = set(adapter_parameters(model).values())
        # Recomputation runs a block's inner layer alone, a slice at a time. Without it backward keeps the copies: one
        # for all slices.
        blocks = (block.inner if block.checkpointing else block for block in model.blocks)
        for module in (model.embedding, *blocks, model.final_norm, model.head):
            ComputeCopies(module, model.compute_dtype, ignored=adapters)
    model.to_empty(device=ranks.device)
    model.tie()
    return backend
