"""Run the adapted linears of one input by products.cpp: the path of compiled runs in bf16 on a CPU.

A linear's base and adapter are terms of one sum, rounded once, and so are the gradients of an input that several
linears share. A quantized weight is decoded into the product's own operand: no dense copy is made, and each calling
thread keeps a few megabytes. `lora_torch` runs what is not covered: DoRA, dropout, rows that choose, formats other
than NF4, and sizes that are not multiples of 64.

Letters: M rows, I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distlora_kernels import products
from distlora_kernels.operands import Linear, LinearGradients, Needs, RowChoice, SavedLinear
from distlora_kernels.products import Factor, product, weighted_sum

COLUMNS = 64
"""In and out features must be a multiple of this."""


def covers(x: Tensor, linears: Sequence[Linear]) -> bool:
    """Return whether this path is on and computes these linears of x, or of their gradient."""
    return products.is_used() and x.dtype == torch.bfloat16 and x.device.type == "cpu" and all(map(_covered, linears))


def _covered(linear: Linear) -> bool:
    adapter, (parts, shape, format) = linear.adapter, linear.weight
    if len(shape) != 2 or shape[0] % COLUMNS or shape[1] % COLUMNS or not (format is None or linear.weight.is_nf4):
        return False
    if len(parts) == 1 and (parts[0].dtype != torch.bfloat16 or not parts[0].is_contiguous()):
        return False
    if linear.bias is not None and linear.bias.dtype != torch.bfloat16:
        return False
    return adapter is None or not (
        adapter.dropout or adapter.magnitude or isinstance(adapter.scale, RowChoice) or adapter.a.shape[0] % 2
    )


def _sum(factors: Sequence[Factor], columns: int, *, transposed: bool, bias: Tensor | None = None) -> Tensor:
    """Return the sum of the factors' products, (M, N), + bias (N,)."""
    out = factors[0].left.new_empty(factors[0].left.shape[0], columns)
    return weighted_sum([factor.term() for factor in factors], out, transposed=transposed, bias=bias)


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) % 2 == 0 else x.contiguous()


def project(x: Tensor, linears: Sequence[Linear]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return s x A^T (M, R) of each linear's adapter, for forward and for backward."""
    downs = [linear.adapter.down(x.dtype) for linear in linears if linear.adapter is not None]
    projected = iter(product(x, torch.cat(downs).T).split([len(down) for down in downs], dim=1) if downs else ())
    gated = [None if adapter is None else next(projected) * adapter.scale for _, adapter, _ in linears]
    return gated, gated


def forward(
    x: Tensor, linears: Sequence[Linear], inputs: list[Tensor | None], *, with_backward: bool
) -> tuple[list[Tensor], list[None]]:
    """Return each linear's y (M, O) of x (M, I), and no magnitudes; `project` gives `inputs`."""
    x, ys = _in_rows(x), []
    for (weight, adapter, bias), gated in zip(linears, inputs, strict=True):
        factors = [Factor(x, weight)]
        if adapter is not None and gated is not None:
            factors.append(Factor(gated, adapter.b.to(x.dtype).contiguous()))
        ys.append(_sum(factors, weight.shape[0], transposed=False, bias=bias))
    return ys, [None] * len(ys)


def backward(
    x: Tensor | None,
    linears: Sequence[Linear],
    saved: Sequence[SavedLinear],
    dys: Sequence[Tensor | None],
    needs: Needs,
) -> LinearGradients:
    """Return what lora_torch.backward does."""
    gradients, factors = LinearGradients(len(linears)), []
    for index, ((weight, adapter, _), dy) in enumerate(zip(linears, dys, strict=True)):
        if dy is None:
            continue
        dy = _in_rows(dy)
        factors.append(Factor(dy, weight))
        if adapter is None:
            continue
        gated = saved[index].xa
        assert x is not None
        assert gated is not None
        assert not isinstance(adapter.scale, RowChoice)
        dxa = product(dy, adapter.b.to(dy.dtype)) * adapter.scale
        factors.append(Factor(dxa, adapter.down(dy.dtype).contiguous()))
        if needs.b[index]:
            gradients.b[index] = product(dy.T, gated).to(adapter.b.dtype)
        if needs.a[index]:
            gradients.a[index] = product(dxa.T, x).to(adapter.a.dtype)
    if needs.x and factors:
        gradients.x = _sum(factors, linears[0].weight.shape[1], transposed=True)
    return gradients
