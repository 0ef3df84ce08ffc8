"""Count collectives where torch dispatches them, independently of the libraries that are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ARGUMENT: dict[str, tuple[str, int]] = {
    "_allgather_base_": ("gathered", 0),
    "allgather_": ("gathered", 0),
    "allgather_into_tensor_coalesced_": ("gathered", 0),
    "_reduce_scatter_base_": ("scattered", 1),
    "reduce_scatter_": ("scattered", 1),
    "reduce_scatter_tensor_coalesced_": ("scattered", 1),
    "allreduce_": ("reduced", 0),
    "allreduce_coalesced_": ("reduced", 0),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("exchanged", 1),
}
"""c10d's collectives: (kind, index of the whole tensor: an all-gather's result, a reduce-scatter's or all-to-all's
input)."""


class Collectives(TorchDispatchMode):
    """Bytes and calls of this thread's collectives, by type (gathered, scattered, reduced, ...) and by ranks.

    Use it as a context manager. On a CPU backward runs in the calling thread, so its collectives are counted too.
    Raises NotImplementedError for an unknown collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[tuple[str, tuple[int, ...]]] = Counter()
        """Bytes by (kind, ranks)."""
        self.calls: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def of(self, kind: str) -> int:
        """Return the bytes of a type over all groups of ranks."""
        return sum(nbytes for (name, _), nbytes in self.nbytes.items() if name == kind)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name in ("barrier", "monitored_barrier_"):
            return
        if name not in _ARGUMENT:
            raise NotImplementedError(f"the counter does not know the collective c10d::{name}")
        kind, whole = _ARGUMENT[name]
        objects = [value for value in args if isinstance(value, torch.ScriptObject)]
        group = next(dist.ProcessGroup.unbox(each) for each in objects if "ProcessGroup" in str(each._type()))
        ranks = tuple(dist.get_process_group_ranks(group))
        self.nbytes[kind, ranks] += sum(tensor.nbytes for tensor in tree_leaves(args[whole]))
        self.calls[kind, ranks] += 1
