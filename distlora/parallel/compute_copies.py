"""One process that trains parameters in fp32 and computes in 16 bits: what FSDP2's mixed precision is on many ranks.

FSDP2 gathers a trained unit as 16-bit copies of its fp32 masters and computes with those alone. A single process has
no gather, so the copies are made here, by hooks around the forward of the same modules, and the gradients flow through
the cast into the masters. A forward is then that of a model of that dtype, bit for bit, in both. Gradients are not:
FSDP2 adds up in 16 bits what is added up in fp32 here, a tied weight's two and those of recomputed slices (README.md,
Limits). Autocast would keep the residual stream and the norms in fp32, and be another model than the frozen base that
LoRA trains on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class ComputeCopies:
    """Puts copies in `dtype` in the place of a module's trained parameters while its forward runs.

    Made anew in each forward, a checkpoint's recomputation included, so that with checkpointing one block's copies
    exist at a time. Without it backward keeps the copies of every forward: the module is then one that runs all slices
    of a batch in one forward.
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
