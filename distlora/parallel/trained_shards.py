"""Sum gradients of trained parameters that FSDP2 shards: reduce-scatter, then all-reduce between copies of the base.

The optimizer sees plain tensors: this rank's rows of each parameter, which share memory with FSDP2's shard. Nothing
whole outlives a unit's backward, except with train.accumulate=step: the sums of the micro-batches before the last one
(fp32, every trained parameter) are kept until they are sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distlora.parallel.traffic import Traffic


class ShardedGradients:
    """Gradients of `parameters`, summed over the ranks of `group`. They are sharded by units within `root`, in `copies`
    copies.
    """

    def __init__(
        self,
        root: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        group: dist.ProcessGroup,
        traffic: Traffic,
        copies: int = 1,
    ) -> None:
        assert isinstance(root, FSDPModule)
        self._root, self._group, self._traffic, self._copies = root, group, traffic, copies
        self._parameters = list(parameters)
        self._rows = [nn.Parameter(shard_of(parameter).to_local()) for parameter in parameters]
        self._poison = torch.zeros((), device=self._rows[0].device)

    def updated(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield (parameter, tensor that the optimizer updates): this rank's rows of it."""
        return zip(self._parameters, self._rows, strict=True)

    def expect(self, *, last: bool) -> None:
        """Prepare a backward. `last`: the sums are sent after it."""
        self._root.set_requires_gradient_sync(last)

    def poison_unless_finite(self, loss: Tensor) -> None:
        """Make the norm NaN on every rank if this rank's loss, a device scalar, is not finite."""
        self._poison += torch.where(torch.isfinite(loss), 0.0, math.nan)

    def finish(self) -> None:
        """Give the sums to the optimizer's tensors, after the last backward has waited for every reduce-scatter."""
        for parameter, rows in zip(self._parameters, self._rows, strict=True):
            shard = shard_of(parameter).to_local()
            assert shard.data_ptr() == rows.data_ptr(), "FSDP2 has moved a shard since its rows were taken"
            assert isinstance(parameter.grad, DTensor), "a trained parameter got no gradient"
            rows.grad = parameter.grad.to_local()

    def squared_norm(self) -> Tensor:
        """Return the squared norm of the whole gradient: the same bits on each rank, NaN if not finite on any."""
        square = torch.stack(torch._foreach_norm(self._gradients())).square().sum() + self._poison
        self._traffic.reduced_bytes += square.nbytes
        self._traffic.between_copies_bytes += (self._copies > 1) * square.nbytes
        # Over the ranks of every copy, which have the same sums: a loss that is not finite may be on any of them.
        dist.all_reduce(square, group=self._group)
        return square / self._copies

    def scale(self, factor: Tensor) -> None:
        torch._foreach_mul_(self._gradients(), factor)

    def zero(self) -> None:
        """Zero the sums for the next step."""
        self._poison.zero_()
        for tensor in (*self._parameters, *self._rows):
            tensor.grad = None

    def _gradients(self) -> list[Tensor]:
        return [rows.grad for rows in self._rows if rows.grad is not None]


def shard_of(parameter: nn.Parameter) -> DTensor:
    """Return a sharded parameter's local data, outside of autograd."""
    data = parameter.data
    assert isinstance(data, DTensor)
    return data
