"""The gradients of one run: those of replicated parameters and of sharded ones behind one interface. Trials that share
a base have one each, so what is not finite in one of them stays there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from distlora.parallel.adapter_sync import GradientReducer
from distlora.parallel.trained_shards import ShardedGradients


class Gradients:
    """`backend.reduce_gradients_of` makes it, and sums it over the ranks."""

    def __init__(self, parts: Sequence[GradientReducer | ShardedGradients]) -> None:
        self._parts = tuple(parts)

    def updated(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(parameter, what the optimizer updates in its place)."""
        return (pair for part in self._parts for pair in part.updated())

    def expect(self, loss: Tensor, *, last: bool) -> None:
        """Before a backward: this run's loss in it, and whether it is the step's last."""
        for part in self._parts:
            part.expect(last=last)
            part.poison_unless_finite(loss)

    def finish(self) -> None:
        """After the last backward, and after `Launches.finish`."""
        for part in self._parts:
            if isinstance(part, ShardedGradients):
                part.finish()

    def clip(self, max_norm: float) -> Tensor:
        """Scale them down to this global norm, 0 for never. Returns the norm before, on the device, which the host does
        not read."""
        norm = torch.stack([part.squared_norm() for part in self._parts]).sum().sqrt()
        if max_norm > 0:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for part in self._parts:
                part.scale(factor)
        return norm

    def zero(self) -> None:
        for part in self._parts:
            part.zero()

    def release(self) -> None:
        """Between steps, for a trial that has ended: own nothing any longer."""
        for part in self._parts:
            assert isinstance(part, GradientReducer), "what is cut is trained to the end"
            part.release()
