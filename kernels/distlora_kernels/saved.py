"""Save what a backward needs before the products that follow are computed.

torch's activation checkpointing ends a recomputation with the last tensor that it saves, and an autograd function's
tensors are saved when its forward is done. Saved here they come first, in a node of their own: a product that is last
in a layer, and whose output nothing saves, is not recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels.dispatch import check_compilation


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trigger: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return trigger.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        return None, None


def save(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Save tensors; return the first argument of the function whose backward needs them, an empty tensor.

    Autograd frees them after that backward. Do not call it where nothing needs a gradient: the result requires one.
    """
    check_compilation()
    node: Tensor = _Save.apply(_trigger(device), tensors)
    return node


def saved_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return the tensors in the backward of the function whose first argument `save` returned."""
    tensors: tuple[Tensor | None, ...] = ctx.next_functions[0][0].saved_tensors
    return tensors


@functools.cache
def _trigger(device: torch.device) -> Tensor:
    """Return the tensor that has autograd record a node; no gradient arrives at it."""
    return torch.empty(0, device=device, requires_grad=True)
