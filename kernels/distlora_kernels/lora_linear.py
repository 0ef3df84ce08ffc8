"""The adapted linear, y = x W^T + s (x A^T) B^T, over frozen weights that are dense or packed: one autograd function
for all linears that are applied to an input.

Two rules make the same function work under FSDP2, ZeRO-3 and none (README.md):
- it saves the weights' Parameters themselves, never a view or a dequantized copy, and dequantizes again in backward: so
  their storage may be freed after forward and refilled before backward (scratch.keeping is the exception, under a
  checkpoint);
- the adapter's term is written first and the base GEMM accumulates into it (beta = 1). Added to an output that is
  already rounded to bf16, an update below half an ulp would vanish.

With dropout it is y = x W^T + s k (d(x) A^T) B^T: d sets the dropped inputs to 0, k makes up for them (dropout.py). The
mask is computed in forward and again in backward, never kept.

Letters: M rows, I in features, O out features, R rank (all adapters of the linear side by side).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import lora_torch
from distlora_kernels.dispatch import uses_triton
from distlora_kernels.operands import Adapter, FrozenWeight, Linear, Needs, RowChoice
from distlora_kernels.scratch import DenseWeights

__all__ = ["Adapter", "FrozenWeight", "Linear", "RowChoice", "lora_linear", "lora_linears"]


def lora_linear(
    x: Tensor, weight: FrozenWeight, adapter: Adapter | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype; gradients for x, a and b, never for the weight or the bias.

    adapter=None is the base alone. GEMMs run in x's dtype with fp32 accumulation; the adapter's gradients have its
    masters' dtype.
    """
    return lora_linears(x, (Linear(weight, adapter, bias),))[0]


def lora_linears(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Several linears of one input x (..., I) -> each one's (..., O), as `lora_linear` gives it.

    x is read once for all their A where no dropout makes them see different inputs, and their gradients of x are added
    up in place. The base GEMMs stay separate.
    """
    adapters = [linear.adapter for linear in linears]
    tensors = [
        tensor
        for linear, adapter in zip(linears, adapters, strict=True)
        for tensor in (*(adapter[:2] if adapter is not None else (None, None)), linear.bias, *linear.weight.parts)
    ]
    # What is no tensor of the graph; the tensors take their places in `_joined`.
    forms = tuple(
        linear._replace(
            weight=linear.weight._replace(parts=(None,) * len(linear.weight.parts)),
            adapter=None if adapter is None else adapter._replace(a=None, b=None),
            bias=None,
        )
        for linear, adapter in zip(linears, adapters, strict=True)
    )
    ys = _LoRALinears.apply(x.flatten(0, -2), forms, *tensors)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in ys)


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forms: tuple[Linear, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights = DenseWeights(len(forms))
        ys, kept = _path(x).forward(x, _joined(forms, tensors), weights)
        adapted = any(form.adapter is not None for form in forms)
        ctx.forms = forms
        ctx.set_materialize_grads(False)
        # x for dA, what the path keeps (x A^T) for dB.
        ctx.save_for_backward(x if adapted else None, *kept, *weights.saved, *tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        forms, count = ctx.forms, len(ctx.forms)
        x, *saved = ctx.saved_tensors
        kept, dense, tensors = saved[:count], saved[count : 2 * count], saved[2 * count :]
        weights = DenseWeights(count)
        weights.saved = dense
        places = list(_places(forms))
        wanted = ctx.needs_input_grad[2:]
        needs = Needs(
            ctx.needs_input_grad[0], tuple(wanted[place] for place in places), tuple(wanted[p + 1] for p in places)
        )
        first = next((dy for dy in dys if dy is not None), None)
        if first is None:
            return (None,) * (2 + len(tensors))
        gradients = _path(first).backward(x, _joined(forms, tensors), weights, kept, dys, needs)
        results: list[Tensor | None] = [None] * len(tensors)
        for place, da, db in zip(places, gradients.a, gradients.b, strict=True):
            results[place], results[place + 1] = da, db
        return (gradients.x, None, *results)


def _path(tensor: Tensor) -> ModuleType:
    """The module that computes forward and backward on this tensor's device."""
    if not uses_triton(tensor):
        return lora_torch
    from distlora_kernels import lora_gpu

    return lora_gpu


def _places(forms: Sequence[Linear]) -> Iterator[int]:
    """Where each linear's tensors start: a, b, bias and the weight's parts."""
    start = 0
    for form in forms:
        yield start
        start += 3 + len(form.weight.parts)


def _joined(forms: Sequence[Linear], tensors: Sequence[Tensor | None]) -> tuple[Linear, ...]:
    """The linears again, of their forms and their tensors."""
    linears = []
    for form, start in zip(forms, _places(forms), strict=True):
        a, b, bias = tensors[start : start + 3]
        weight = form.weight._replace(parts=tuple(tensors[start + 3 : start + 3 + len(form.weight.parts)]))
        adapter = None if form.adapter is None else form.adapter._replace(a=a, b=b)
        linears.append(Linear(weight, adapter, bias))
    return tuple(linears)
