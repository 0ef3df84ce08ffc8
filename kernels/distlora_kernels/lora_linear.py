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

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import lora_native, lora_torch
from distlora_kernels.dispatch import check_compilation, uses_triton
from distlora_kernels.dropout import ChosenDropout, Dropout
from distlora_kernels.formats import Format
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
from distlora_kernels.saved import save, saved_tensors

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
    forms = tuple(_Form.of(linear) for linear in linears)
    tensors = [tensor for linear in linears for tensor in _tensors(linear)]
    rows = x.flatten(0, -2)
    with torch.no_grad():
        inputs, xas = _path(rows, linears).project(rows, linears)
    keeper = None
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (rows, *tensors)):
        adapted = any(form.scale is not None for form in forms)
        # x for dA, x A^T for dB.
        keeper = save((rows if adapted else None, *xas, *tensors), rows.device)
    has_magnitude = any(linear.adapter is not None and linear.adapter.magnitude is not None for linear in linears)
    if unread and torch.is_grad_enabled() and not has_magnitude:
        inputs = None
    ys = _LoRALinears.apply(keeper, rows, forms, inputs, *tensors)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in ys)


class _Form(NamedTuple):
    """The non-tensor part of a linear."""

    shape: tuple[int, ...]
    num_parts: int
    format: Format | None
    scale: float | RowChoice | None
    """None without an adapter."""
    dropout: Dropout | ChosenDropout | None
    copies: Copies | None
    """Not saved: they outlive the step's backward."""

    @staticmethod
    def of(linear: Linear) -> _Form:
        adapter, (parts, shape, format) = linear.adapter, linear.weight
        if adapter is None:
            return _Form(shape, len(parts), format, None, None, None)
        return _Form(shape, len(parts), format, adapter.scale, adapter.dropout, adapter.copies)


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


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keeper: Tensor | None, x: Tensor, forms: tuple[_Form, ...], inputs: Any, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        linears = _joined(forms, tensors)
        if inputs is None:
            ys = [x.new_full((), math.nan).expand(len(x), form.shape[0]) for form in forms]
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
        places = list(_places(forms))
        wanted = ctx.needs_input_grad[4:]
        needs = Needs(
            ctx.needs_input_grad[1], *(tuple(wanted[place + offset] for place in places) for offset in range(3))
        )
        first = next((dy for dy in dys if dy is not None), None)
        if first is None:
            return (None,) * (4 + len(tensors))
        linears = _joined(forms, tensors)
        gradients = _path(first, linears).backward(x, linears, saved, dys, needs)
        results: list[Tensor | None] = [None] * len(tensors)
        for place, *by_kind in zip(places, gradients.a, gradients.b, gradients.magnitude, strict=True):
            results[place : place + len(by_kind)] = by_kind
        return (None, gradients.x, None, None, *results)


def _path(tensor: Tensor, linears: Sequence[Linear]) -> ModuleType:
    """Return the module that computes forward and backward on this tensor's device; torch's if there are no rows."""
    if not uses_triton(tensor) or tensor.shape[0] == 0:
        return lora_native if lora_native.covers(tensor, linears) else lora_torch
    from distlora_kernels import lora_gpu

    return lora_gpu


def _places(forms: Sequence[_Form]) -> Iterator[int]:
    """Yield the start of each linear's tensors."""
    start = 0
    for form in forms:
        yield start
        start += _NUM_TENSORS + form.num_parts


def _joined(forms: Sequence[_Form], tensors: Sequence[Any]) -> tuple[Linear, ...]:
    """Rebuild the linears from their forms and tensors."""
    linears = []
    for form, start in zip(forms, _places(forms), strict=True):
        a, b, masters, norms, bias, *parts = tensors[start : start + _NUM_TENSORS + form.num_parts]
        magnitude = None if masters is None else Magnitude(masters, norms)
        adapter = None if form.scale is None else Adapter(a, b, form.scale, form.dropout, magnitude, form.copies)
        linears.append(Linear(FrozenWeight(tuple(parts), form.shape, form.format), adapter, bias))
    return tuple(linears)
