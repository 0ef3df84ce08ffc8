"""Combine the gradients of one run: replicated and sharded parameters behind one interface.

Trials that share a base have one `Gradients` each, so a value that is not finite stays in its trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from distlora.parallel.adapter_sync import GradientReducer
from distlora.parallel.trained_shards import ShardedGradients


class Gradients:
    """Gradients of one run, made and summed over the ranks by `backend.reduce_gradients_of`."""

    def __init__(self, parts: Sequence[GradientReducer | ShardedGradients]) -> None:
        self._parts = tuple(parts)

    def updated(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield (parameter, tensor that the optimizer updates in its place)."""
        return (pair for part in self._parts for pair in part.updated())

    def expect(self, loss: Tensor, *, last: bool) -> None:
        """Prepare a backward with this run's loss. `last`: it is the step's last."""
        for part in self._parts:
            part.expect(last=last)
            part.poison_unless_finite(loss)

    def finish(self) -> None:
        """Complete the sums after the last backward and after `Launches.finish`."""
        for part in self._parts:
            if isinstance(part, ShardedGradients):
                part.finish()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to this global norm, 0 for never. Returns the norm before, on the device."""
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
        """Free the gradients of a trial that has ended, between steps."""
        for part in self._parts:
            assert isinstance(part, GradientReducer), "what is cut is trained to the end"
            part.release()
