"""Gradients of replicated parameters: flat buckets, each all-reduced once a step while backward goes on.

Every parameter's .grad is a view into a bucket's flat buffer, so backward accumulates in place and a reduction needs no
copy. A bucket is launched when its last gradient of the step has arrived, strictly in bucket order: ranks may finish
buckets in different order, collectives may not be issued so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlora.parallel.traffic import Traffic


class GradientReducer:
    """Sums gradients over the ranks of `group`; with group=None (one process) only owns the buffers.

    Backward runs from the last parameter to the first, so buckets are filled from the end of `parameters`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        group: dist.ProcessGroup | None,
        bucket_bytes: int,
        traffic: Traffic,
        between_copies: bool = False,
    ) -> None:
        """`between_copies`: whether ranks of several copies of the base meet in `group`."""
        self._group, self._traffic, self._between_copies = group, traffic, between_copies
        self._buckets: list[Tensor] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._sizes: list[int] = []
        self._is_last = True
        self._works: list[dist.Work] = []
        for members in _cut(list(reversed(parameters)), bucket_bytes):
            self._add_bucket(members)
        self._pending = list(self._sizes)
        self._launched = 0

    def _add_bucket(self, members: list[nn.Parameter]) -> None:
        first = members[0]
        flat = torch.zeros(sum(p.numel() for p in members), dtype=first.dtype, device=first.device)
        for parameter, view in zip(members, flat.split([p.numel() for p in members]), strict=True):
            parameter.grad = view.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(self._arrived)
            self._bucket_of[parameter] = len(self._buckets)
        self._buckets.append(flat)
        self._sizes.append(len(members))

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
        self._buckets[0][:1] += torch.where(torch.isfinite(loss), 0.0, math.nan)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._is_last:
            return
        self._pending[self._bucket_of[parameter]] -= 1
        while self._launched < len(self._buckets) and self._pending[self._launched] == 0:
            self._launch_next()

    def _launch_next(self) -> None:
        flat = self._buckets[self._launched]
        self._launched += 1
        if self._group is not None:
            self._traffic.reduced_bytes += flat.nbytes
            self._traffic.between_copies_bytes += self._between_copies * flat.nbytes
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            assert work is not None
            self._works.append(work)

    def finish(self) -> None:
        """Reduce what has not been launched (a parameter that got no gradient on this rank) and wait for everything."""
        while self._launched < len(self._buckets):
            self._launch_next()
        for work in self._works:
            work.wait()
        self._works.clear()
        self._launched = 0
        self._pending = list(self._sizes)

    def squared_norm(self) -> Tensor:
        """Of the whole gradient, a device scalar. After `finish` every rank has the same bits, so nothing is sent."""
        gradients = [parameter.grad for parameter in self._bucket_of if parameter.grad is not None]
        # By parameters and not by buckets, whose single sum over a million numbers lost 1e-5 of it on the CPU.
        return torch.stack(torch._foreach_norm(gradients)).square().sum()

    def scale(self, factor: Tensor) -> None:
        for flat in self._buckets:
            flat.mul_(factor)

    def zero(self) -> None:
        """Start the next step's sums. The gradients stay views: never set them to None."""
        for flat in self._buckets:
            flat.zero_()


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
