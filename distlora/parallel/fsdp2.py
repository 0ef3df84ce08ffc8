"""FSDP2 over the frozen base: each block is a unit, gathered as packed bytes; adapters stay outside, replicated.

Units: every Block; the embedding and the head, one unit where they are tied; the final norm in the root. No
mixed-precision policy: it would round the fp32 scales. Facts behind each line are in this folder's README.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from distlora.adapters import adapter_parameters
from distlora.config import UserError
from distlora.model import CausalLM
from distlora.parallel.traffic import Traffic

FIRST_TORCH = (2, 12)
"""FSDP2 of torch 2.11 gives every sharded parameter requires_grad=True, which uint8 cannot have."""


# TODO: call dist.all_gather_single once torch >= 2.13, which gave it this name, is required.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class _CountedAllGather:
    """FSDP2's all-gather with the bytes of its result counted (the protocol of FSDPModule.set_custom_all_gather)."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.traffic.gathered_bytes += output_tensor.nbytes
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def check_torch(version: str) -> None:
    """Raises UserError for a torch whose FSDP2 cannot hold frozen uint8 parameters."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or tuple(map(int, match.groups())) < FIRST_TORCH:
        raise UserError(
            f"torch {version} cannot shard 4-bit weights (its FSDP2 refuses frozen uint8 parameters); "
            "install torch >= 2.12, or run one process with cluster.gpus_per_node=1"
        )


def shard(model: CausalLM, mesh: DeviceMesh, *, prefetch: bool, traffic: Traffic) -> None:
    """Shard every frozen parameter of `model` (on meta) over the mesh, in place."""
    check_torch(torch.__version__)
    ignored = set(adapter_parameters(model).values())
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    if model.tied:
        fully_shard([model.embedding, model.head], mesh=mesh, reshard_after_forward=True)
    else:
        fully_shard(model.embedding, mesh=mesh, reshard_after_forward=True)
        fully_shard(model.head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params=ignored)

    count = _CountedAllGather(traffic)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(count)  # type: ignore[arg-type]
    # Neither is read in backward: embeddings need no gradient, and the head took its own in forward (head.py).
    for module in (model.embedding, model.head):
        if isinstance(module, FSDPModule):
            module.set_unshard_in_backward(False)
    if prefetch:
        for block, following in zip(model.blocks, model.blocks[1:], strict=False):
            assert isinstance(block, FSDPModule)
            assert isinstance(following, FSDPModule)
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])
