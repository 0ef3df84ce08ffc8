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
from distlora_kernels.operands import Adapter, Gradients, Kept, KeptOfMagnitude, Linear, Needs, RowChoice
from distlora_kernels.scratch import DenseWeights


def forward(
    x: Tensor, linears: Sequence[Linear], weights: DenseWeights, *, with_backward: bool
) -> tuple[list[Tensor], list[Kept]]:
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
        if adapter.magnitude is None:
            y, own = _adapted(x, weight, gated, adapter, bias), Kept(gated)
        else:
            y, of_magnitude = _with_magnitude(x, seen, weight, gated, adapter, bias)
            own = Kept(gated, of_magnitude)
        ys.append(y)
        kept.append(own)
    return ys, kept


def _adapted(x: Tensor, weight: Tensor, gated: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
    """x W^T + gated B^T + bias, (M, O)."""
    up = adapter.b.to(x.dtype).T
    delta = gated @ up if bias is None else torch.addmm(bias, gated, up)
    return torch.addmm(delta, x, weight.T, out=delta)


def _with_magnitude(
    x: Tensor, seen: Tensor, weight: Tensor, gated: Tensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, KeptOfMagnitude]:
    """y (M, O) of DoRA, and what backward keeps; `seen` is d(x) but for its scale, which `gated` has."""
    factors = dora_linear.factors(adapter, weight @ adapter.a.to(x.dtype).T, x.dtype)
    if adapter.dropout is None:
        return dora_linear.scaled(adapter, factors, _adapted(x, weight, gated, adapter, bias), bias)
    delta = gated @ adapter.b.to(x.dtype).T
    output = torch.addmm(delta, seen, weight.T, alpha=adapter.dropout.scale)
    rest, own = dora_linear.scaled_beside_the_base(factors, delta, output, bias)
    return torch.addmm(rest, x, weight.T, out=rest), own


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
            if own.magnitude is not None:
                assert own.magnitude.excess is not None
                if needs.magnitude[index]:
                    gradients.magnitude[index] = dora_linear.gradient(adapter, own.magnitude, dy)
                scaled = dora_linear.plus_excess(dy, dy, own.magnitude.excess)
                if adapter.dropout is None:
                    dy = scaled
                else:
                    dropped_dy = dora_linear.times_excess(dy, own.magnitude.excess)
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
