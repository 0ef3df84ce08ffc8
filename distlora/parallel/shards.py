"""How a tensor is cut over ranks: along dim 0, ceil(rows / ranks) rows for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distlora.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Shards:
    """The ranks that cut one copy of the base between them, and this one's place among them."""

    index: int
    count: int
    """1: nothing is cut."""
    group: dist.ProcessGroup | None
    """None where nothing is cut."""

    @classmethod
    def over(cls, ranks: Ranks) -> Shards:
        """One copy over all ranks."""
        return cls(ranks.rank, ranks.world, ranks.group)


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of dim 0 that this rank owns, as writable memory, and the index of the first of them."""
    data = tensor.data
    if not isinstance(data, DTensor):
        return data, 0
    # FSDP2 cuts dim 0 like torch.chunk: ceil(rows / ranks) each, the last ranks may get fewer or none.
    per_rank = -(-data.shape[0] // data.device_mesh.size())
    return data.to_local(), min(per_rank * data.device_mesh.get_local_rank(), data.shape[0])


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape that a tensor has over all ranks."""
    return tensor.data.shape
