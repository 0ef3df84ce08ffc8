"""The adapted linears of one input in torch operations: the path of the CPU, and of every dtype.

Each linear's gradient of the input is computed by itself and they are added from the last linear to the first, as
autograd would add those of separate functions: grouping changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distlora_kernels import dora_linear
from distlora_kernels.dropout import Dropout, dropped
from distlora_kernels.operands import Gradients, Kept, Linear, Needs, RowChoice
from distlora_kernels.scratch import DenseWeights


def forward(x: Tensor, linears: Sequence[Linear], weights: DenseWeights) -> tuple[list[Tensor], list[Kept]]:
    """x (M, I) -> each linear's y (M, O), and what its backward keeps: s x A^T (M, R) of one with an adapter."""
    ys: list[Tensor] = []
    kept: list[Kept] = []
    for index, (linear, (seen, xa)) in enumerate(zip(linears, _project_down(x, linears), strict=True)):
        weight, bias, adapter = weights.take(index, linear.weight, x.dtype), linear.bias, linear.adapter
        if adapter is None:
            ys.append(x @ weight.T if bias is None else torch.addmm(bias, x, weight.T))
            kept.append(Kept())
            continue
        gated = (xa * _gate(linear, x.shape[0])).to(x.dtype)
        if adapter.magnitude is not None:
            y, own = _with_magnitude(x, seen, linear, weight, gated)
            ys.append(y)
            kept.append(own)
            continue
        up = adapter.b.to(x.dtype).T
        delta = gated @ up if bias is None else torch.addmm(bias, gated, up)
        ys.append(torch.addmm(delta, x, weight.T, out=delta))
        kept.append(Kept(gated))
    return ys, kept


def _with_magnitude(x: Tensor, seen: Tensor, linear: Linear, weight: Tensor, gated: Tensor) -> tuple[Tensor, Kept]:
    """y (M, O) of DoRA, and what backward keeps; `seen` is d(x) but for its scale, which `gated` has."""
    adapter, bias = linear.adapter, linear.bias
    assert adapter is not None
    assert adapter.magnitude is not None
    up = adapter.b.to(x.dtype).T
    norms, excess = dora_linear.factors(adapter, weight @ adapter.a.to(x.dtype).T, x.dtype)
    if adapter.dropout is not None:
        delta = gated @ up
        output = torch.addmm(delta, seen, weight.T, alpha=adapter.dropout.scale)
        y = dora_linear.plus_excess(delta, output, excess, out=delta)
        y = y if bias is None else y.add_(bias)
        return torch.addmm(y, x, weight.T, out=y), Kept(gated, output, norms, excess)
    delta = gated @ up if bias is None else torch.addmm(bias, gated, up)
    y = torch.addmm(delta, x, weight.T, out=delta)
    if bias is None:
        y = dora_linear.plus_excess(y, y, excess, out=y)
        return y, Kept(gated, y, dora_linear.divisor_of_scaled(adapter, norms), excess)
    # The bias is in the sum as in the base's, so that k = 1 changes no bit, and is not scaled.
    output = y - bias
    return dora_linear.plus_excess(y, output, excess), Kept(gated, output, norms, excess)


def backward(
    x: Tensor | None,
    linears: Sequence[Linear],
    weights: DenseWeights,
    kept: Sequence[Kept],
    dys: Sequence[Tensor | None],
    needs: Needs,
) -> Gradients:
    """The gradients of the sum of <y, dy> over the linears; x is None where no linear has an adapter."""
    gradients = Gradients(len(linears))
    for index in reversed(range(len(linears))):
        linear, own, dy = linears[index], kept[index], dys[index]
        if dy is None:
            continue
        adapter, dropped_dy = linear.adapter, None
        dxa = mask = None
        if adapter is not None:
            assert x is not None
            assert own.xa is not None
            scaled = dy
            if own.excess is not None:
                if needs.magnitude[index]:
                    gradients.magnitude[index] = dora_linear.gradient(adapter, own, dy)
                scaled = dora_linear.plus_excess(dy, dy, own.excess)
                if adapter.dropout is None:
                    dy = scaled
                else:
                    dropped_dy = dora_linear.times_excess(dy, own.excess)
            a, b = adapter.a, adapter.b
            dxa = ((scaled @ b.to(dy.dtype)) * _gate(linear, x.shape[0])).to(dy.dtype)
            if needs.b[index]:
                gradients.b[index] = (scaled.T @ own.xa).to(b.dtype)
            mask = _mask(adapter.dropout, x)
            if needs.a[index]:
                gradients.a[index] = (dxa.T @ _zeroed(x, mask)).to(a.dtype)
        if needs.x:
            weight = weights.take(index, linear.weight, dy.dtype)
            if adapter is None or dxa is None:
                dx = dy @ weight
            else:
                dx = dxa @ adapter.a.to(dy.dtype)
                if dropped_dy is not None:
                    assert adapter.dropout is not None
                    dx = torch.addmm(dx, dropped_dy, weight, alpha=adapter.dropout.scale, out=dx)
                dx = _zeroed(dx, mask)
                dx = torch.addmm(dx, dy, weight, out=dx)
            gradients.x = dx if gradients.x is None else gradients.x.add_(dx)
    return gradients


def _project_down(x: Tensor, linears: Sequence[Linear]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each linear what its adapter sees of x, and X A^T of that, by one product where all see the same; of no rank
    without an adapter.
    """
    adapters = [linear.adapter for linear in linears]
    downs = [x.new_empty(0, x.shape[1]) if adapter is None else adapter.a.to(x.dtype) for adapter in adapters]
    dropouts = [None if adapter is None else adapter.dropout for adapter in adapters]
    if len(linears) > 1 and not any(dropouts):
        for xa in (x @ torch.cat(downs).T).split([down.shape[0] for down in downs], dim=1):
            yield x, xa
        return
    for dropout, down in zip(dropouts, downs, strict=True):
        seen = _zeroed(x, _mask(dropout, x))
        yield seen, seen @ down.T


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
