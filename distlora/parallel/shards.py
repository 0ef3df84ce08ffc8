"""Define which ranks shard a replica of the base, and how: along dim 0, ceil(rows / ranks) rows each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distlora.parallel.ranks import Ranks

# TODO: call dist.all_gather_single once torch >= 2.13, which gave it this name, is required.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True, slots=True)
class Shards:
    """Ranks that shard one replica of the base, and this rank's place among them.

    They are consecutive, like the ranks of a node: traffic of the base stays within a node if their number divides the
    node's number of ranks.
    """

    index: int
    count: int
    """Number of ranks per replica; 1: nothing is sharded."""
    group: dist.ProcessGroup | None
    """Process group of the replica; None if nothing is sharded."""
    replica: int = 0
    """Index of this rank's replica of the base."""
    num_replicas: int = 1
    """Number of replicas."""
    replicate_group: dist.ProcessGroup | None = None
    """Group of the ranks that hold the same rows, one of each replica; None with one replica."""

    @classmethod
    def over(cls, ranks: Ranks, degree: int | None = None) -> Shards:
        """Divide the ranks into replicas of `degree` ranks each, which must divide their number; None: one over all.

        Every rank must call it alike, because it makes process groups.
        """
        degree = ranks.world if degree is None else degree
        if degree == ranks.world:
            return cls(ranks.rank, ranks.world, ranks.group)
        assert ranks.world % degree == 0, f"{ranks.world} ranks do not divide into groups of {degree}"
        replica, index = divmod(ranks.rank, degree)
        group, replicate_group, num_replicas = None, ranks.group, ranks.world // degree
        if degree > 1:
            parts = torch.arange(ranks.world).view(num_replicas, degree)
            group, replicate_group = (
                dist.new_subgroups_by_enumeration(members.tolist(), timeout=ranks.timeout)[0]
                for members in (parts, parts.T)
            )
        return cls(index, degree, group, replica, num_replicas, replicate_group)

    def mesh(self, device_type: str) -> DeviceMesh:
        """Return FSDP2's device mesh: the ranks of a replica, after a dimension of replicas if there are several."""
        assert self.group is not None
        if self.replicate_group is None:
            return DeviceMesh.from_group(self.group, device_type, mesh_dim_names=("shard",))
        ranks = torch.arange(self.num_replicas * self.count).view(self.num_replicas, self.count)
        groups = [self.replicate_group, self.group]
        return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))

    def rank_of(self, index: int, replica: int | None = None) -> int:
        """Return the rank that holds the `index`-th shard of a replica; of this rank's without `replica`."""
        return (self.replica if replica is None else replica) * self.count + index

    def split_replicas(self, per_machine: int) -> list[int]:
        """Return the replicas that span two nodes of so many ranks each."""
        if per_machine % self.count == 0 or self.count % per_machine == 0:
            return []
        ends = ((n, self.rank_of(0, n), self.rank_of(self.count - 1, n)) for n in range(self.num_replicas))
        return [replica for replica, first, last in ends if first // per_machine != last // per_machine]

    def crosses(self, group: dist.ProcessGroup) -> bool:
        """Return whether ranks of more than one replica belong to `group`."""
        return len({rank // self.count for rank in dist.get_process_group_ranks(group)}) > 1


@dataclass(frozen=True, slots=True)
class Cut:
    """Shard of a parameter that is empty until it is gathered (ZeRO-3), read by `local_rows`."""

    padded: Tensor
    """(rows of a rank, ...): this rank's, in the memory that is gathered from, with zeros at the end on the last
    rank."""
    first_row: int
    shape: torch.Size
    """Shape of the whole parameter."""

    @classmethod
    def of(cls, padded: Tensor, shape: torch.Size, shards: Shards) -> Cut:
        """Build from the memory of this rank's rows of a parameter of this shape."""
        return cls(padded, min(shards.index * len(padded), shape[0]), shape)

    @property
    def rows(self) -> Tensor:
        """Return this rank's rows without those that fill up."""
        return self.padded[: min(len(self.padded), self.shape[0] - self.first_row)]


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return this rank's rows of dim 0, as writable memory, and the index of the first of them."""
    data, cut = tensor.data, getattr(tensor, "cut", None)
    if cut is not None:  # ZeRO-3: the tensor is empty until it is gathered.
        return cut.rows, cut.first_row
    if not isinstance(data, DTensor):
        return data, 0
    # FSDP2 shards dim 0 like torch.chunk: ceil(rows / ranks) each, and the last ranks may get fewer or none. With
    # several replicas its mesh has a second dimension.
    mesh, axis = data.device_mesh, data.placements.index(Shard(0))
    per_rank = -(-data.shape[0] // mesh.size(axis))
    return data.to_local(), min(per_rank * mesh.get_local_rank(axis), data.shape[0])


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the unsharded tensor."""
    cut = getattr(tensor, "cut", None)
    return tensor.data.shape if cut is None else cut.shape


PIECE_BYTES = 8 * 2**20
"""Bytes sent at once: 8 ms at 1 GB/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRows:
    """Host copy of this rank's rows of a tensor that is sharded along dim 0, ceil(rows / ranks) rows each."""

    local: Tensor
    """(rows of this rank, ...), contiguous."""
    first_row: int
    shape: torch.Size
    """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the shard."""
        return self.local.dtype

    def numel(self) -> int:
        """Return the number of elements of the whole tensor."""
        return self.shape.numel()


def stream_rows(
    rows: HostRows, write: Callable[[Tensor], object], *, group: dist.ProcessGroup, rank: int, world: int
) -> None:
    """Pass the whole tensor to `write` on rank 0, in flat pieces and in order. Other ranks do not call it.

    The first `world` ranks of `group` hold it, and each must call this for the same tensors in the same order, on one
    thread.
    """
    flat, start = rows.local.view(-1), rows.first_row * math.prod(rows.shape[1:])
    size = PIECE_BYTES // rows.dtype.itemsize
    received = torch.empty(min(size, rows.numel()) if rank == 0 else 0, dtype=rows.dtype)
    for owner, low, high in pieces(rows.shape, world, size):
        if rank not in (0, owner):
            continue
        piece = flat[low - start : high - start] if owner == rank else received[: high - low]
        if owner != 0 and rank == 0:
            dist.recv(piece, group=group, group_src=owner)
        elif owner != 0:
            dist.send(piece, group=group, group_dst=0)
        if rank == 0:
            write(piece)


def pieces(shape: torch.Size, count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, first element, end) of the flat pieces (at most `size` elements) of a tensor in `count` shards."""
    per_shard = -(-shape[0] // count) * math.prod(shape[1:])
    for first in range(0, shape.numel(), per_shard):
        end = min(first + per_shard, shape.numel())
        yield from ((first // per_shard, low, min(low + size, end)) for low in range(first, end, size))
