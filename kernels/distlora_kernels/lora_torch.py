"""The adapted linears of one input in torch operations: the path of the CPU, and of every dtype.

Each linear's gradient of the input is computed by itself and they are added from the last linear to the first, as
autograd would add those of separate functions: grouping changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distlora_kernels.dropout import Dropout, dropped
from distlora_kernels.operands import Gradients, Linear, Needs, RowChoice
from distlora_kernels.scratch import DenseWeights


def forward(x: Tensor, linears: Sequence[Linear], weights: DenseWeights) -> tuple[list[Tensor], list[Tensor | None]]:
    """x (M, I) -> each linear's y (M, O), and what its backward keeps: s x A^T (M, R), None without an adapter."""
    ys: list[Tensor] = []
    kept: list[Tensor | None] = []
    for index, (linear, xa) in enumerate(zip(linears, _project_down(x, linears), strict=True)):
        weight, bias = weights.take(index, linear.weight, x.dtype), linear.bias
        if linear.adapter is None:
            ys.append(x @ weight.T if bias is None else torch.addmm(bias, x, weight.T))
            kept.append(None)
            continue
        gated = (xa * _gate(linear, x.shape[0])).to(x.dtype)
        up = linear.adapter.b.to(x.dtype).T
        delta = gated @ up if bias is None else torch.addmm(bias, gated, up)
        ys.append(torch.addmm(delta, x, weight.T, out=delta))
        kept.append(gated)
    return ys, kept


def backward(
    x: Tensor | None,
    linears: Sequence[Linear],
    weights: DenseWeights,
    kept: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
    needs: Needs,
) -> Gradients:
    """The gradients of the sum of <y, dy> over the linears; x is None where no linear has an adapter."""
    gradients = Gradients(len(linears))
    for index in reversed(range(len(linears))):
        linear, gated, dy = linears[index], kept[index], dys[index]
        if dy is None:
            continue
        dxa = mask = None
        if linear.adapter is not None:
            assert x is not None
            assert gated is not None
            a, b = linear.adapter.a, linear.adapter.b
            dxa = ((dy @ b.to(dy.dtype)) * _gate(linear, x.shape[0])).to(dy.dtype)
            if needs.b[index]:
                gradients.b[index] = (dy.T @ gated).to(b.dtype)
            mask = _mask(linear.adapter.dropout, x)
            if needs.a[index]:
                gradients.a[index] = (dxa.T @ _zeroed(x, mask)).to(a.dtype)
        if needs.x:
            weight = weights.take(index, linear.weight, dy.dtype)
            if linear.adapter is None or dxa is None:
                dx = dy @ weight
            else:
                dx = _zeroed(dxa @ linear.adapter.a.to(dy.dtype), mask)
                dx = torch.addmm(dx, dy, weight, out=dx)
            gradients.x = dx if gradients.x is None else gradients.x.add_(dx)
    return gradients


def _project_down(x: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """X A^T of each linear, by one product where all see the same input; of no rank without an adapter."""
    adapters = [linear.adapter for linear in linears]
    downs = [x.new_empty(0, x.shape[1]) if adapter is None else adapter.a.to(x.dtype) for adapter in adapters]
    dropouts = [None if adapter is None else adapter.dropout for adapter in adapters]
    if len(linears) > 1 and not any(dropouts):
        return list((x @ torch.cat(downs).T).split([down.shape[0] for down in downs], dim=1))
    return [_zeroed(x, _mask(dropout, x)) @ down.T for dropout, down in zip(dropouts, downs, strict=True)]


def _gate(linear: Linear, num_rows: int) -> Tensor | float:
    assert linear.adapter is not None
    scale, dropout = linear.adapter.scale, linear.adapter.dropout
    gate = scale.gate(num_rows) if isinstance(scale, RowChoice) else scale
    return gate if dropout is None else gate * dropout.scale


def _mask(dropout: Dropout | None, x: Tensor) -> Tensor | None:
    """(M, I) bool: what the adapter does not see of x."""
    return None if dropout is None else dropped(dropout, *x.shape)


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(mask, 0)
