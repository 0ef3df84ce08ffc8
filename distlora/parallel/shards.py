"""Which ranks cut a copy of the base between them, and how a tensor is cut: along dim 0, ceil(rows / ranks) each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distlora.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Shards:
    """The ranks that cut one copy of the base between them, and this one's place among them.

    They are consecutive, as the ranks of a machine are: nothing of the base then travels between machines where their
    number divides that of a machine's ranks.
    """

    index: int
    count: int
    """1: nothing is cut."""
    group: dist.ProcessGroup | None
    """None where nothing is cut."""
    copy: int = 0
    """Which copy of the base this rank has a part of,"""
    copies: int = 1
    """of how many."""
    replicas: dist.ProcessGroup | None = None
    """The ranks that own the same rows, one of each copy; None where there is one copy."""

    @classmethod
    def over(cls, ranks: Ranks, degree: int | None = None) -> Shards:
        """Copies of `degree` ranks each, which must divide their number; None: one copy over all.

        Every rank must call it alike: it makes process groups.
        """
        degree = ranks.world if degree is None else degree
        if degree == ranks.world:
            return cls(ranks.rank, ranks.world, ranks.group)
        assert ranks.world % degree == 0, f"{ranks.world} ranks are no copies of {degree} each"
        copy, index = divmod(ranks.rank, degree)
        group, replicas, copies = None, ranks.group, ranks.world // degree
        if degree > 1:
            parts = torch.arange(ranks.world).view(copies, degree)
            group, replicas = (
                dist.new_subgroups_by_enumeration(members.tolist(), timeout=ranks.timeout)[0]
                for members in (parts, parts.T)
            )
        return cls(index, degree, group, copy, copies, replicas)

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks as FSDP2 wants them: those of a copy, behind the copies where there are several."""
        assert self.group is not None
        if self.replicas is None:
            return DeviceMesh.from_group(self.group, device_type, mesh_dim_names=("shard",))
        ranks = torch.arange(self.copies * self.count).view(self.copies, self.count)
        groups = [self.replicas, self.group]
        return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))

    def rank_of(self, index: int, copy: int | None = None) -> int:
        """The rank that has the `index`-th part of a copy of the base, this one's own or another."""
        return (self.copy if copy is None else copy) * self.count + index

    def split_copies(self, per_machine: int) -> list[int]:
        """The copies that lie across the border of two machines of so many ranks, by a degree that fits no machine."""
        if per_machine % self.count == 0 or self.count % per_machine == 0:
            return []
        ends = ((copy, self.rank_of(0, copy), self.rank_of(self.count - 1, copy)) for copy in range(self.copies))
        return [copy for copy, first, last in ends if first // per_machine != last // per_machine]

    def crosses(self, group: dist.ProcessGroup) -> bool:
        """Whether ranks of more than one copy meet in `group`."""
        return len({rank // self.count for rank in dist.get_process_group_ranks(group)}) > 1


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of dim 0 that this rank owns, as writable memory, and the index of the first of them."""
    data, cut = tensor.data, getattr(tensor, "cut", None)
    if cut is not None:  # ZeRO-3's: the tensor itself is empty until it is gathered.
        return cut.rows, cut.first_row
    if not isinstance(data, DTensor):
        return data, 0
    # FSDP2 cuts dim 0 like torch.chunk: ceil(rows / ranks) each, the last ranks may get fewer or none. Where there are
    # several copies its mesh has a dim of them too.
    mesh, axis = data.device_mesh, data.placements.index(Shard(0))
    per_rank = -(-data.shape[0] // mesh.size(axis))
    return data.to_local(), min(per_rank * mesh.get_local_rank(axis), data.shape[0])


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape that a tensor has over all ranks."""
    cut = getattr(tensor, "cut", None)
    return tensor.data.shape if cut is None else cut.shape
