"""Sharding and gradient reduction: `parallelize` is the one place that knows about ranks.

Model files never import torch.distributed, and the trainer never asks which backend it has: what both may see is
`Backend`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distlora.config import Config
from distlora.model import CausalLM
from distlora.parallel import fsdp2
from distlora.parallel.adapter_sync import GradientReducer
from distlora.parallel.traffic import Traffic
from distlora.quant import FrozenTensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who this process is among the run's workers, and where it computes."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None
    """All workers; None for a single process, which starts no process group."""


def join_ranks() -> Ranks:
    """Join the workers that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK): NCCL with GPUs, gloo without."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, world, device, dist.group.WORLD if world > 1 else None)


def leave_ranks(ranks: Ranks) -> None:
    """Leave the group. Without the barrier, a rank that leaves early can abort one that is still tidying up."""
    if ranks.group is not None:
        dist.barrier(ranks.group)
        dist.destroy_process_group()


@dataclass(slots=True)
class Backend:
    """What the trainer and the loader may know of parallelism."""

    ranks: Ranks
    sharded: bool
    """Whether the base is cut over the ranks; one process and adapter=full keep it whole."""
    traffic: Traffic = field(default_factory=Traffic)
    _reducer: GradientReducer | None = None

    @property
    def writes(self) -> bool:
        """Whether this rank writes what all ranks have alike: checkpoints and results."""
        return self.ranks.rank == 0

    def local_rows(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """The rows of dim 0 that this rank owns, as writable memory, and the index of the first of them."""
        data = parameter.data
        if not isinstance(data, DTensor):
            return data, 0
        # FSDP2 cuts dim 0 like torch.chunk: ceil(rows / ranks) each, the last ranks may get fewer or none.
        per_rank = -(-data.shape[0] // data.device_mesh.size())
        return data.to_local(), min(per_rank * data.device_mesh.get_local_rank(), data.shape[0])

    def gather_rows(self, local: Tensor) -> Tensor:
        """Every rank's `local` (same shape on each), one after the other along dim 0. For loading, not for a step."""
        if not self.sharded:
            return local
        gathered = [torch.empty_like(local) for _ in range(self.ranks.world)]
        dist.all_gather(gathered, local, group=self.ranks.group)
        return torch.cat(gathered)

    def reduce_gradients_of(self, parameters: list[nn.Parameter], bucket_mb: float) -> None:
        """Own the gradients of these replicated parameters (in forward order) from now on."""
        bucket_bytes = int(bucket_mb * 2**20)
        self._reducer = GradientReducer(
            parameters, group=self.ranks.group, bucket_bytes=bucket_bytes, traffic=self.traffic
        )

    @property
    def reducer(self) -> GradientReducer:
        assert self._reducer is not None, "reduce_gradients_of comes first"
        return self._reducer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; with the step's `last` one, send each bucket over the ranks as it completes.

        A loss that is not finite makes the sums of all ranks NaN, so that each of them sees it in the norm.
        """
        self.reducer.expect(last=last)
        self.reducer.poison_unless_finite(loss.detach())
        loss.backward()

    def finish_gradients(self) -> None:
        """Wait until every gradient is the sum over all ranks: identical bits on each."""
        self.reducer.finish()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to this global norm, 0 for never; returns the norm before, on the device."""
        return self.reducer.clip(max_norm)

    def zero_gradients(self) -> None:
        self.reducer.zero()

    def unpacked_extra_bytes(self, model: CausalLM, passes: int) -> int:
        """What `passes` gathers of every block would move beyond what they do, were the packed weights bf16."""
        if not self.sharded:
            return 0
        world, extra = self.ranks.world, 0
        for weight in (module for module in model.modules() if isinstance(module, FrozenTensor) and module.quantized):
            groups = world * -(-weight.codes.shape[0] // world)
            extra += 2 * weight.numel - groups * weight.group_bytes
        return passes * extra

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The elementwise sum over all ranks, in place. For counters between steps."""
        if self.ranks.group is not None:
            dist.all_reduce(tensor, group=self.ranks.group)
        return tensor

    def max_over_ranks(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all ranks, in place."""
        if self.ranks.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.ranks.group)
        return tensor

    def barrier(self) -> None:
        if self.ranks.group is not None:
            dist.barrier(self.ranks.group)


def parallelize(model: CausalLM, ranks: Ranks, config: Config) -> Backend:
    """Shard the base of `model` (on meta) as the config says and give its memory to the device, unfilled."""
    backend = Backend(ranks, sharded=ranks.world > 1 and config.adapter.method != "full")
    if backend.sharded:
        assert ranks.group is not None
        mesh = DeviceMesh.from_group(ranks.group, ranks.device.type, mesh_dim_names=("shard",))
        fsdp2.shard(model, mesh, prefetch=config.parallel.prefetch, traffic=backend.traffic)
    model.to_empty(device=ranks.device)
    model.tie()
    return backend
