"""Gradients of replicated parameters: flat buckets, each all-reduced once a step while backward goes on.

Every parameter's .grad is a view into a bucket's flat buffer, so backward accumulates in place and a reduction needs no
copy. A bucket is launched when its last gradient of the step has arrived, strictly in the order of the buckets: ranks
may finish them in different order, collectives may not be issued so. Trials that share a base have buckets of their
own, which take their turns in one order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlora.parallel.traffic import Traffic


@dataclass(slots=True, eq=False)
class _Bucket:
    """Gradients that are sent together."""

    flat: Tensor
    size: int
    """Parameters."""
    behind: float
    """The share of its owner's parameters, by number, that have their gradients when the bucket is complete."""
    pending: int = field(init=False)
    """Gradients of this step that have not arrived."""

    def __post_init__(self) -> None:
        self.pending = self.size


class Launches:
    """The order in which the buckets of all owners are sent over the ranks of `group`; with group=None (one process)
    nothing is."""

    def __init__(self, group: dist.ProcessGroup | None, traffic: Traffic, *, between_copies: bool = False) -> None:
        """`between_copies`: whether ranks of several copies of the base meet in `group`."""
        self._group, self._traffic, self._between_copies = group, traffic, between_copies
        self._buckets: list[_Bucket] = []
        self._launched = 0
        self._works: list[dist.Work] = []

    def add(self, buckets: Sequence[_Bucket]) -> None:
        """Between steps: send these too, each when backward has come as far as it has to."""
        # Sorting is stable, so the order is the same on every rank: that of `add` where two are equal.
        self._buckets = sorted([*self._buckets, *buckets], key=lambda bucket: bucket.behind)

    def remove(self, buckets: Sequence[_Bucket]) -> None:
        """Between steps: send these no longer."""
        self._buckets = [bucket for bucket in self._buckets if bucket not in buckets]

    def launch_complete(self) -> None:
        """Send what is complete and has nothing before it that is not."""
        while self._launched < len(self._buckets) and self._buckets[self._launched].pending == 0:
            self._launch_next()

    def finish(self) -> None:
        """Send what has not been (a parameter got no gradient on this rank) and wait for everything."""
        while self._launched < len(self._buckets):
            self._launch_next()
        for work in self._works:
            work.wait()
        self._works.clear()
        self._launched = 0
        for bucket in self._buckets:
            bucket.pending = bucket.size

    def _launch_next(self) -> None:
        flat = self._buckets[self._launched].flat
        self._launched += 1
        if self._group is not None:
            self._traffic.reduced_bytes += flat.nbytes
            self._traffic.between_copies_bytes += self._between_copies * flat.nbytes
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            assert work is not None
            self._works.append(work)


class GradientReducer:
    """Owns the gradients of one run's `parameters` (in forward order) and has them summed by `launches`.

    Backward runs from the last parameter to the first, so buckets are filled from the end of `parameters`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, bucket_bytes: int, launches: Launches) -> None:
        self._launches = launches
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._is_last = True
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for members in _cut(list(reversed(parameters)), bucket_bytes):
            self._add_bucket(members, len(parameters))
        launches.add(self._buckets)

    def _add_bucket(self, members: list[nn.Parameter], total: int) -> None:
        first = members[0]
        flat = torch.zeros(sum(p.numel() for p in members), dtype=first.dtype, device=first.device)
        behind = (len(self._bucket_of) + len(members)) / total
        bucket = _Bucket(flat, len(members), behind)
        for parameter, view in zip(members, flat.split([p.numel() for p in members]), strict=True):
            parameter.grad = view.view_as(parameter)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._arrived))
            self._bucket_of[parameter] = bucket
        self._buckets.append(bucket)

    def release(self) -> None:
        """Between steps: own nothing any longer."""
        self._launches.remove(self._buckets)
        for hook in self._hooks:
            hook.remove()
        for parameter in self._bucket_of:
            parameter.grad = None

    def updated(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(parameter, what the optimizer updates): itself."""
        return ((parameter, parameter) for parameter in self._bucket_of)

    def expect(self, *, last: bool) -> None:
        """Before a backward: whether it is the step's last, whose gradients complete the sums."""
        self._is_last = last

    def poison_unless_finite(self, loss: Tensor) -> None:
        """Before a backward: make the sums NaN on every rank where this rank's loss, a device scalar, is not finite.

        A loss may be infinite and its gradient finite. Adding 0 otherwise changes no bit that matters (-0 becomes 0).
        """
        self._buckets[0].flat[:1] += torch.where(torch.isfinite(loss), 0.0, math.nan)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._is_last:
            self._bucket_of[parameter].pending -= 1
            self._launches.launch_complete()

    def squared_norm(self) -> Tensor:
        """Of the whole gradient, a device scalar. After `finish` every rank has the same bits, so nothing is sent."""
        gradients = [parameter.grad for parameter in self._bucket_of if parameter.grad is not None]
        # By parameters and not by buckets, whose single sum over a million numbers lost 1e-5 of it on the CPU.
        return torch.stack(torch._foreach_norm(gradients)).square().sum()

    def scale(self, factor: Tensor) -> None:
        for bucket in self._buckets:
            bucket.flat.mul_(factor)

    def zero(self) -> None:
        """Start the next step's sums. The gradients stay views: never set them to None."""
        for bucket in self._buckets:
            bucket.flat.zero_()


def _cut(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Neighbours in buckets of `bucket_bytes` or a little more, one dtype and device each."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        same = bool(buckets) and buckets[-1][0].dtype == parameter.dtype and buckets[-1][0].device == parameter.device
        if not same or size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets
