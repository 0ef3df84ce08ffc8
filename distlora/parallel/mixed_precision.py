"""Train fp32 parameters and compute in 16 bits in one process, as FSDP2's mixed precision does on many ranks.

FSDP2 gathers a trained unit as 16-bit copies of its fp32 masters and computes with those. A single process gathers
nothing, so hooks around each module's forward make the copies, and gradients flow through the cast into the masters.
The forward equals that of a model of that dtype, bit for bit, in both cases. Gradients differ: FSDP2 accumulates in 16
bits what is accumulated in fp32 here (a tied weight's two gradients, recomputed slices). Autocast would keep the
residual stream and the norms in fp32, which is another model than the frozen base of LoRA.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class ComputeCopies:
    """Copies in `dtype` that replace a module's trained parameters while its forward runs.

    Each forward makes them anew, a recomputation included, so with activation checkpointing one layer's copies exist at
    a time. Without it backward keeps the copies of every forward: give it a module that runs all slices of a batch at
    once.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, ignored: Collection[nn.Parameter] = ()) -> None:
        self._dtype = dtype
        self._places = [
            (owner, name)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter.requires_grad and parameter not in ignored
        ]
        self._masters: list[nn.Parameter] = []
        if not self._places:
            return
        module.register_forward_pre_hook(self._put)
        # Recomputation ends a forward by an exception when it has all that backward needs.
        module.register_forward_hook(self._take_away, always_call=True)

    def _put(self, module: nn.Module, arguments: Any) -> None:
        assert not self._masters, "a module with copies in place was called within its own forward"
        for owner, name in self._places:
            master = owner._parameters.pop(name)
            assert master is not None
            self._masters.append(master)
            setattr(owner, name, master.to(self._dtype))

    def _take_away(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        for (owner, name), master in zip(self._places, self._masters, strict=True):
            delattr(owner, name)
            setattr(owner, name, master)
        self._masters.clear()
