"""Combine the gradients of one run: replicated and sharded parameters behind one interface.

Trials that share a base have one `Gradients` each, so a value that is not finite stays in its trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distlora.parallel.ranks import Traffic


class Gradients:
    """Gradients of one run, made and summed over the ranks by `backend.reduce_gradients_of`."""

    def __init__(self, parts: Sequence[GradientReducer | ShardedGradients]) -> None:
        self._parts = tuple(parts)

    def updated(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield (parameter, tensor that the optimizer updates in its place)."""
        return (pair for gradients in self._parts for pair in gradients.updated())

    def expect(self, loss: Tensor, *, last: bool) -> None:
        """Prepare a backward with this run's loss. `last`: it is the step's last."""
        for gradients in self._parts:
            gradients.expect(loss, last=last)

    def finish(self) -> None:
        """Complete the sums after the last backward and after `Launches.finish`."""
        for gradients in self._parts:
            if isinstance(gradients, ShardedGradients):
                gradients.finish()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to this global norm, 0 for never. Returns the norm before, on the device."""
        norm = torch.stack([gradients.squared_norm() for gradients in self._parts]).sum().sqrt()
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradients in self._parts:
                gradients.scale(factor)
        return norm

    def zero(self) -> None:
        """Zero the sums for the next step."""
        for gradients in self._parts:
            gradients.zero()

    def release(self) -> None:
        """Free the gradients of a trial that has ended, between steps."""
        for gradients in self._parts:
            assert isinstance(gradients, GradientReducer), "what is sharded is trained to the end"
            gradients.release()


@dataclass(slots=True, eq=False)
class _Bucket:
    """Gradients that are all-reduced together."""

    flat: Tensor
    size: int
    """Number of parameters."""
    behind: float
    """Fraction of the run's parameters, by number, whose gradients have arrived when the bucket is complete."""
    pending: int = field(init=False)
    """Number of gradients that have not arrived in this step."""

    def __post_init__(self) -> None:
        self.pending = self.size


class Launches:
    """Launch order of all runs' buckets over the ranks of `group`. With group=None (one process) nothing is sent."""

    def __init__(self, group: dist.ProcessGroup | None, traffic: Traffic, *, between_replicas: bool = False) -> None:
        """Start without buckets. `between_replicas`: `group` has ranks of several replicas of the base."""
        self._group, self._traffic, self._between_replicas = group, traffic, between_replicas
        self._buckets: list[_Bucket] = []
        self._launched = 0
        self._works: list[dist.Work] = []

    def add(self, buckets: Sequence[_Bucket]) -> None:
        """Add buckets between steps. Each is sent when backward has completed it."""
        # Sorting is stable, so every rank has the same order, and equal keys keep the order of `add`.
        self._buckets = sorted([*self._buckets, *buckets], key=lambda bucket: bucket.behind)

    def remove(self, buckets: Sequence[_Bucket]) -> None:
        """Remove buckets between steps."""
        self._buckets = [bucket for bucket in self._buckets if bucket not in buckets]

    def launch_complete(self) -> None:
        """Send the complete buckets that no incomplete bucket precedes."""
        while self._launched < len(self._buckets) and self._buckets[self._launched].pending == 0:
            self._launch_next()

    def finish(self) -> None:
        """Send the buckets that are left (a parameter got no gradient on this rank) and wait for all of them."""
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
            self._traffic.between_replicas_bytes += self._between_replicas * flat.nbytes
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            assert work is not None
            self._works.append(work)


class GradientReducer:
    """Gradients of one run's `parameters` (in forward order), summed over ranks by `launches`.

    Backward runs from the last parameter to the first, so buckets are filled from the end of `parameters`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, bucket_bytes: int, launches: Launches) -> None:
        self._launches = launches
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._is_last = True
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for members in _cut(list(reversed(parameters)), bucket_bytes):
            sizes, first = [parameter.numel() for parameter in members], members[0]
            flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
            bucket = _Bucket(flat, len(members), (len(self._bucket_of) + len(members)) / len(parameters))
            for parameter, view in zip(members, flat.split(sizes), strict=True):
                parameter.grad = view.view_as(parameter)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._arrived))
                self._bucket_of[parameter] = bucket
            self._buckets.append(bucket)
        launches.add(self._buckets)

    def release(self) -> None:
        """Free the gradients, between steps."""
        self._launches.remove(self._buckets)
        for hook in self._hooks:
            hook.remove()
        for parameter in self._bucket_of:
            parameter.grad = None

    def updated(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield (parameter, tensor that the optimizer updates): itself, twice."""
        return ((parameter, parameter) for parameter in self._bucket_of)

    def expect(self, loss: Tensor, *, last: bool) -> None:
        """Prepare a backward. `last`: it is the step's last, whose gradients complete the sums.

        Make the sums NaN on every rank if this rank's loss, a device scalar, is not finite: its gradient may be finite.
        """
        self._is_last = last
        # Otherwise this adds 0, which changes no bit but the sign of -0.
        self._buckets[0].flat[:1] += torch.where(torch.isfinite(loss), 0.0, math.nan)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._is_last:
            self._bucket_of[parameter].pending -= 1
            self._launches.launch_complete()

    def squared_norm(self) -> Tensor:
        """Return the squared norm of the whole gradient, a device scalar, identical on every rank after `finish`."""
        gradients = [parameter.grad for parameter in self._bucket_of if parameter.grad is not None]
        # Summed by parameter: a bucket's single sum over a million numbers lost 1e-5 of the norm on the CPU.
        return torch.stack(torch._foreach_norm(gradients)).square().sum()

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients by a scalar tensor."""
        for bucket in self._buckets:
            bucket.flat.mul_(factor)

    def zero(self) -> None:
        """Zero the sums for the next step. The gradients stay views: never set them to None."""
        for bucket in self._buckets:
            bucket.flat.zero_()


def _cut(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Split neighbours into buckets of at least `bucket_bytes`, each of one dtype and device."""
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


class ShardedGradients:
    """Gradients of `parameters`, summed over the ranks of `group`.

    They are sharded by units within `root`, in `num_replicas` replicas.
    """

    def __init__(
        self,
        root: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        group: dist.ProcessGroup,
        traffic: Traffic,
        num_replicas: int = 1,
    ) -> None:
        assert isinstance(root, FSDPModule)
        self._root, self._group, self._traffic, self._num_replicas = root, group, traffic, num_replicas
        self._parameters = list(parameters)
        self._rows = [nn.Parameter(shard_of(parameter).to_local()) for parameter in parameters]
        self._poison = torch.zeros((), device=self._rows[0].device)

    def updated(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield (parameter, tensor that the optimizer updates): this rank's rows of it."""
        return zip(self._parameters, self._rows, strict=True)

    def expect(self, loss: Tensor, *, last: bool) -> None:
        """Prepare a backward; the `last` sends the sums. A loss that is not finite makes the norm NaN on every rank."""
        self._root.set_requires_gradient_sync(last)
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
        self._traffic.between_replicas_bytes += (self._num_replicas > 1) * square.nbytes
        # Over the ranks of every replica, which have the same sums: a loss that is not finite may be on any of them.
        dist.all_reduce(square, group=self._group)
        return square / self._num_replicas

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients by a scalar tensor."""
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
