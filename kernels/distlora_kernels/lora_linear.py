"""Apply the adapted linear y = x W^T + s (x A^T) B^T over frozen weights, dense or quantized.

One autograd function runs all linears that are applied to an input. Two rules make it work under FSDP2, ZeRO-3 and no
sharding (README.md):
- it saves the weights' Parameters themselves, never a view or a dequantized copy, and dequantizes again in backward, so
  their storage may be freed after forward and refilled before backward;
- the adapter's term is written first and the base GEMM accumulates into it (beta = 1). Added to an output that is
  already rounded to bf16, an update below half an ulp would vanish.

With dropout y = x W^T + s k (d(x) A^T) B^T, where d zeroes the dropped inputs and k rescales (dropout.py). The mask is
computed in forward and again in backward. With a magnitude the linear is DoRA's (dora.py).

Letters: M rows, I in features, O out features, R rank (all adapters of the linear side by side).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import lora_native, lora_torch
from distlora_kernels.dispatch import check_compilation, uses_triton
from distlora_kernels.operands import (
    Adapter,
    Copies,
    FrozenWeight,
    Linear,
    Magnitude,
    Needs,
    RowChoice,
    SavedDora,
    SavedLinear,
)

__all__ = ["Adapter", "Copies", "FrozenWeight", "Linear", "Magnitude", "RowChoice", "lora_linear", "lora_linears"]


def lora_linear(
    x: Tensor, weight: FrozenWeight, adapter: Adapter | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """Return y (..., O) in x's dtype of x (..., I), with gradients for x, a and b; not for the weight or the bias.

    adapter=None is the base alone. GEMMs run in x's dtype with fp32 accumulation; the adapter's gradients have its
    masters' dtype.
    """
    return lora_linears(x, (Linear(weight, adapter, bias),))[0]


def lora_linears(x: Tensor, linears: Sequence[Linear], *, unread: bool = False) -> tuple[Tensor, ...]:
    """Return lora_linear of several linears of one input x (..., I).

    x is read once for all their A, unless dropout gives them different inputs, and their gradients of x are summed in
    place. The base GEMMs stay separate. `unread`: only the graph is needed; in grad mode the outputs are NaN, unless a
    gradient of DoRA reads them.
    """
    check_compilation()
    by_linear = [_tensors(linear) for linear in linears]
    # Without tensors, which autograd keeps and frees. The copies stay: they outlive the step's backward.
    forms = [_with_tensors(linear, (None,) * len(own)) for linear, own in zip(linears, by_linear, strict=True)]
    tensors = [tensor for own in by_linear for tensor in own]
    rows = x.flatten(0, -2)
    with torch.no_grad():
        inputs, xas = _path(rows, linears).project(rows, linears)
    keeper = None
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (rows, *tensors)):
        adapted = any(linear.adapter is not None for linear in linears)
        # x for dA, x A^T for dB.
        keeper = save((rows if adapted else None, *xas, *tensors), rows.device)
    has_magnitude = any(linear.adapter is not None and linear.adapter.magnitude is not None for linear in linears)
    if unread and torch.is_grad_enabled() and not has_magnitude:
        inputs = None
    ys = _LoRALinears.apply(keeper, rows, forms, inputs, *tensors)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in ys)


_NUM_TENSORS = 5
"""Number of tensors of a linear, besides its weight's parts."""

_NO_MAGNITUDE = (None,) * len(SavedDora._fields)


def _tensors(linear: Linear) -> tuple[Tensor | None, ...]:
    """Return the tensors of a linear for autograd: a, b, magnitudes, row norms, bias and the weight's parts."""
    a = b = masters = row_norms_squared = None
    if linear.adapter is not None:
        a, b = linear.adapter[:2]
        if linear.adapter.magnitude is not None:
            masters, row_norms_squared = linear.adapter.magnitude
    return (a, b, masters, row_norms_squared, linear.bias, *linear.weight.parts)


def _with_tensors(linear: Linear, tensors: Sequence[Any]) -> Linear:
    """Return the linear with these tensors in the places of those that `_tensors` returns."""
    a, b, masters, row_norms_squared, bias, *parts = tensors
    adapter = linear.adapter
    if adapter is not None:
        magnitude = None if masters is None else Magnitude(masters, row_norms_squared)
        adapter = adapter._replace(a=a, b=b, magnitude=magnitude)
    return Linear(linear.weight._replace(parts=tuple(parts)), adapter, bias)


def _by_linear(forms: Sequence[Linear], values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield, of what there is for each tensor of all linears, that of each linear."""
    start = 0
    for form in forms:
        stop = start + _NUM_TENSORS + len(form.weight.parts)
        yield values[start:stop]
        start = stop


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keeper: Tensor | None, x: Tensor, forms: Sequence[Linear], inputs: Any, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        linears = [_with_tensors(*pair) for pair in zip(forms, _by_linear(forms, tensors), strict=True)]
        if inputs is None:
            ys = [x.new_full((), math.nan).expand(len(x), form.weight.shape[0]) for form in forms]
            magnitudes = [None] * len(forms)
        else:
            ys, magnitudes = _path(x, linears).forward(x, linears, inputs, with_backward=keeper is not None)
        ctx.forms = forms
        ctx.set_materialize_grads(False)
        # y for the gradient of the magnitude.
        ctx.save_for_backward(*(tensor for each in magnitudes for tensor in each or _NO_MAGNITUDE))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        forms, count = ctx.forms, len(ctx.forms)
        x, *rest = saved_tensors(ctx)
        xas, tensors = rest[:count], rest[count:]
        after, size = ctx.saved_tensors, len(_NO_MAGNITUDE)
        saved = [
            SavedLinear(xa, SavedDora.of(after[size * index : size * (index + 1)])) for index, xa in enumerate(xas)
        ]
        wanted = _by_linear(forms, ctx.needs_input_grad[4:])
        needs = Needs(ctx.needs_input_grad[1], *zip(*(own[:3] for own in wanted), strict=True))
        first = next((dy for dy in dys if dy is not None), None)
        if first is None:
            return (None,) * (4 + len(tensors))
        linears = [_with_tensors(*pair) for pair in zip(forms, _by_linear(forms, tensors), strict=True)]
        gradients = _path(first, linears).backward(x, linears, saved, dys, needs)
        results: list[Tensor | None] = []
        for own, *by_kind in zip(linears, gradients.a, gradients.b, gradients.magnitude, strict=True):
            results += by_kind + [None] * (len(_tensors(own)) - len(by_kind))
        return (None, gradients.x, None, None, *results)


def _path(tensor: Tensor, linears: Sequence[Linear]) -> ModuleType:
    """Return the module that computes forward and backward on this tensor's device.

    torch's if there are no rows, and in fp64: Triton's kernels add in fp32.
    """
    if not uses_triton(tensor) or tensor.shape[0] == 0 or tensor.dtype == torch.float64:
        return lora_native if lora_native.covers(tensor, linears) else lora_torch
    from distlora_kernels import lora_gpu

    return lora_gpu


class _Save(torch.autograd.Function):
    """Saves what a backward needs before the products that follow are computed.

    torch's activation checkpointing ends a recomputation with the last tensor that it saves, and an autograd function's
    tensors are saved when its forward is done. Saved here they come first, in a node of their own: a product that is
    last in a layer, and whose output nothing saves, is not recomputed.
    """

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
