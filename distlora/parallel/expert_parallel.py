"""Divide the experts of each layer over the ranks of a replica, and exchange tokens instead of gathering weights.

FSDP2 shards a weight's rows (groups of 16,384 weights, or experts of a dense weight) into equal runs. Where each run is
a whole number of experts, a rank's rows are the weight of its experts: loading, caching, checking and saving see the
same rows with and without this, and only the gather is left out.

A call sorts its rows by expert and sends each to the rank that has it (all-to-all); the results come back the same way,
and so do the gradients in backward. The ranks exchange the numbers of rows first, which the host reads: once per
layer and forward.

Letters: S rows of a rank (tokens x chosen experts), R received rows, E experts, N ranks of a replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from distlora.config import UserError
from distlora.model.build import CausalLM
from distlora.model.by_document import ByDocument
from distlora.model.experts import Experts, ExpertWeight
from distlora.parallel.ranks import Shards, Traffic
from distlora_kernels.format_layouts import shards_whole_experts


def divide_experts(
    model: CausalLM, shards: Shards, device_type: str, traffic: Traffic, *, required: bool = True
) -> None:
    """Give each rank of a replica its experts of every layer of `model` (on meta), and the exchange of their rows.

    Every rank must call it alike. Unless `required`, all experts stay whole if a weight cannot be sharded by whole
    experts. Raises UserError if it is required and cannot, or nothing can be.
    """
    layers = experts_of_batches(model, f"parallel.expert_degree={shards.count}", "1")
    if not required and not all(_is_whole(weight, shards.count) for experts in layers for weight in experts.weights):
        model.notes.append(
            f"{shards.count} ranks cannot divide the experts (parallel.expert_degree=replica), so every rank gathers "
            "all of them, as with parallel.expert_degree=1"
        )
        return
    assert shards.group is not None, "one rank has nothing to divide"
    exchange = _Exchange(shards.group, shards.count, traffic)
    mesh = shards.mesh(device_type)
    placements: list[Placement] = [Shard(0)] if shards.num_replicas == 1 else [Replicate(), Shard(0)]
    for experts in layers:
        experts.exchange = exchange.begin
        for weight in experts.weights:
            _check_shards(weight, shards.count)
            per_rank = weight.num_experts // shards.count
            weight.local = slice(shards.index * per_rank, (shards.index + 1) * per_rank)
            for name, whole in list(weight.named_parameters(recurse=False)):
                rows = torch.empty(len(whole) // shards.count, *whole.shape[1:], dtype=whole.dtype, device="meta")
                shard = DTensor.from_local(
                    rows, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
                )
                setattr(weight, name, nn.Parameter(shard, requires_grad=False))
    model.notes.append(
        f"each rank has 1/{shards.count} of the experts of {len(layers):,} layers, whose tokens are exchanged"
    )


def _is_whole(weight: ExpertWeight, count: int) -> bool:
    """Return whether the rows of a rank are the weight of whole experts."""
    return shards_whole_experts(weight.shape, None if weight.format is None else weight.format.name, count)


def experts_of_batches(model: CausalLM, setting: str, off: str) -> list[Experts]:
    """Return the experts of all layers, which run as often on every rank; raises UserError if they do not.

    `setting` needs that, and its value `off` does not.
    """
    apart = [module for module in model.modules() if isinstance(module, ByDocument)]
    if any(isinstance(module, Experts) for outer in apart for module in outer.modules()):
        raise UserError(
            f"{setting}: this model runs its experts on one document after the other, and ranks have different "
            f"documents; set {setting.partition('=')[0]}={off}"
        )
    return [module for module in model.modules() if isinstance(module, Experts)]


def _check_shards(weight: ExpertWeight, count: int) -> None:
    """Raise UserError if the rows of a rank are not the weight of whole experts."""
    if not _is_whole(weight, count):
        (experts, *matrix), format = weight.shape, "dense" if weight.format is None else weight.format.name
        raise UserError(
            f"parallel.expert_degree={count} cannot divide a weight of {experts:,} experts of "
            f"{' x '.join(f'{size:,}' for size in matrix)} ({format}) between experts; set "
            "parallel.expert_degree=1, or another parallel.shard_degree"
        )


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Exchange of rows between the ranks of this replica."""

    group: dist.ProcessGroup
    """The replica's. Collectives of a group run in the order of their calls, which is the same on all ranks: forward's
    and backward's, which run the same graph."""
    count: int
    """N."""
    traffic: Traffic

    def begin(self, num_rows: Tensor) -> _Call:
        """Exchange (E,) int64, the number of rows of each expert, with the other ranks, and wait for it."""
        received = torch.empty_like(num_rows)
        dist.all_to_all_single(received, num_rows, group=self.group)
        self.traffic.exchanged_bytes += num_rows.nbytes
        by_rank = torch.stack((num_rows, received)).view(2, self.count, -1)
        sent, taken = by_rank.sum(dim=2).tolist()  # The only read of the host.
        local = torch.arange(by_rank.shape[2], device=num_rows.device).repeat(self.count)
        return _Call(self, local.repeat_interleave(received, output_size=sum(taken)), sent, taken)


@dataclass(frozen=True, slots=True)
class _Call:
    """`distlora.model.experts.RowExchange` of one call."""

    exchange: _Exchange
    experts: Tensor
    sent: list[int]
    """Rows for the experts of each rank, S together."""
    taken: list[int]
    """Rows from each rank, R together."""

    def send(self, rows: Tensor) -> Tensor:
        return self._moved(rows, True)

    def give_back(self, rows: Tensor) -> Tensor:
        return self._moved(rows, False)

    def _moved(self, rows: Tensor, outward: bool) -> Tensor:
        moved: Tensor = _AllToAll.apply(rows, self, outward)
        return moved

    def move(self, rows: Tensor, *, outward: bool) -> Tensor:
        """Return (R, ...) from (S, ...), or from (R, ...) to (S, ...) if not `outward`.

        The bytes of the S rows are counted, whose number does not depend on the routing.
        """
        sizes = (self.sent, self.taken) if outward else (self.taken, self.sent)
        received = rows.new_empty(sum(sizes[1]), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), sizes[1], sizes[0], group=self.exchange.group)
        self.exchange.traffic.exchanged_bytes += rows.nbytes if outward else received.nbytes
        return received


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows, whose backward is that of the gradients the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: _Call, outward: bool) -> Tensor:
        ctx.call, ctx.outward = call, outward
        return call.move(rows, outward=outward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.call.move(gradient, outward=not ctx.outward), None, None
