"""DoRA inside the adapted linear, on either path: the factors k = m / n of its outputs, and what they do to gradients.

    v = d(x) W^T + s (d(x) A^T) B^T       (M, O), what the magnitude multiplies; d as in dropout.py
    y = k v + bias                        without dropout, where d(x) = x
    y = x W^T + (k - 1) d(x) W^T + k s (d(x) A^T) B^T + bias = x W^T + (v - d(x) W^T) + (k - 1) v + bias

The second line is what PEFT computes: what is dropped from the adapter's input is dropped from what the magnitude
changes of the base, not from the base. k is constant in backward but for m (the paper's section 4.3), so
    dm = sum over rows of dy v / n = sum over rows of dy (k v) / m,
and everything else follows as in lora_linear.py, of k dy in the place of dy.

Always k - 1 is applied, as y + (k - 1) y: it is exactly 0 at the start, and in bf16 it keeps 8 bits where k would keep
those of 1 + something small. Rows that use no adapter have k = 1.

Where one adapter without dropout has all rows, and the weight is packed, k can be folded into the rows of W and B
instead: y = x (k W)^T + s (x A^T) (k B)^T + bias is a LoRA, whose product is never read again to be scaled, and k is
multiplied in before W is rounded: in bf16 no output that is rounded already swallows a small change of m.

A row of W that is 0 has no direction to keep: whatever m says, k is 1 there and dm 0, and the row trains as a LoRA's.
(Its m starts at 0: k = m / n would hold it at 0 as soon as B moves.) The norms below are 0 for such a row, and a norm
of 0 says so everywhere.

Letters: B rows of the batch, M rows of the flattened input, I in features, O out features, N adapters, R their ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels import fused
from distlora_kernels.dora import dora_norms, magnitude_gradient, scaled_rows
from distlora_kernels.operands import Adapter, FrozenWeight, KeptOfMagnitude, Linear, RowChoice


class Factors(NamedTuple):
    """The k of a linear's outputs."""

    norms: Tensor
    """n, (N, O) fp32; 0 where W's row is 0, or that of W + s B A, and k is 1."""
    excess: Tensor
    """k - 1 as (O,), or (B, O) where rows choose."""


def factors(adapter: Adapter, wa: Tensor, dtype: torch.dtype) -> Factors:
    """Of wa = W A^T (O, R), k - 1 in `dtype`."""
    magnitude = adapter.magnitude
    assert magnitude is not None
    squares, a = magnitude.row_norms_squared, adapter.a.to(dtype)
    if not isinstance(adapter.scale, RowChoice):
        norms = _of_directions(squares, dora_norms(squares, wa, a, adapter.b, adapter.scale)[None])
        return Factors(norms, _excess(magnitude.masters, norms)[0].to(dtype))
    choice, parts = adapter.scale, []
    for number, scale in enumerate(choice.scales):
        own = choice.columns(number)
        parts.append(dora_norms(squares, wa[:, own], a[own], adapter.b[:, own], scale))
    norms = _of_directions(squares, torch.stack(parts))
    excess = _excess(magnitude.masters, norms)
    return Factors(norms, _of_rows(excess, choice.rows, otherwise=0.0).to(dtype))


def _of_directions(row_norms_squared: Tensor, norms: Tensor) -> Tensor:
    return torch.where(row_norms_squared == 0, 0.0, norms)


def folds(adapter: Adapter, weight: FrozenWeight, dtype: torch.dtype) -> bool:
    """Whether k can be folded into the weight, and W A^T computed from its packed form."""
    plain = adapter.dropout is None and not isinstance(adapter.scale, RowChoice)
    return plain and weight.packed and fused.supports(weight.shape) and dtype in (torch.bfloat16, torch.float16)


def folded(linear: Linear, factor: Tensor) -> Linear:
    """The LoRA that computes the linear's output with k = factor (O,) fp32. Its gradient of k B is that of B over k."""
    adapter = linear.adapter
    assert adapter is not None
    adapter = adapter._replace(b=adapter.b * factor[:, None], magnitude=None)
    return linear._replace(weight=scaled_rows(linear.weight, factor), adapter=adapter)


def scaled(adapter: Adapter, factors: Factors, y: Tensor, bias: Tensor | None) -> tuple[Tensor, KeptOfMagnitude]:
    """k v + bias, written over y = v + bias (M, O), without dropout; and what backward keeps."""
    if bias is None:
        y = plus_excess(y, y, factors.excess, out=y)
        return y, KeptOfMagnitude(y, _divisor_of_scaled(adapter, factors), factors.excess)
    # The bias is in the sum as in the base's, so that k = 1 changes no bit, and is not scaled.
    output = y - bias
    y = plus_excess(y, output, factors.excess, out=y)
    return y, KeptOfMagnitude(output, factors.norms, factors.excess)


def scaled_beside_the_base(
    factors: Factors, delta: Tensor, output: Tensor, bias: Tensor | None
) -> tuple[Tensor, KeptOfMagnitude]:
    """What x W^T is added to with dropout, written over delta = s (d(x) A^T) B^T (M, O); `output` is v."""
    rest = plus_excess(delta, output, factors.excess, out=delta)
    return rest if bias is None else rest.add_(bias), KeptOfMagnitude(output, factors.norms, factors.excess)


def kept_of_folded(
    linear: Linear, factors: Factors, factor: Tensor, y: Tensor, *, with_backward: bool
) -> KeptOfMagnitude:
    """What backward keeps of y (M, O), the output of folded(linear, factor)."""
    assert linear.adapter is not None
    output: Tensor | None = y
    if linear.bias is not None:
        output = y - linear.bias if with_backward else None
    return KeptOfMagnitude(output, _divisor_of_scaled(linear.adapter, factors), None, factor)


def _divisor_of_scaled(adapter: Adapter, factors: Factors) -> Tensor:
    """What the sum of dy (k v) is divided by to give dm, (N, O) fp32: m, and 0 as n is where k is not m / n."""
    assert adapter.magnitude is not None
    return torch.where(factors.norms == 0, 0.0, adapter.magnitude.masters)


def _excess(masters: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms == 0, 0.0, masters / norms - 1)


def _of_rows(values: Tensor, rows: Tensor, *, otherwise: float) -> Tensor:
    """(N, O) of the adapters -> (B, O) of the rows; `otherwise` for rows that use none, which are the last (-1)."""
    return torch.cat([values, torch.full_like(values[:1], otherwise)])[rows]


def plus_excess(base: Tensor, rows: Tensor, excess: Tensor, *, out: Tensor | None = None) -> Tensor:
    """base + (k - 1) rows, (M, O), rounded once; `out` may be either of them."""
    if excess.dim() == 1:
        return torch.addcmul(base, rows, excess, out=out)
    batch = (excess.shape[0], base.shape[0] // excess.shape[0])
    base, rows, excess = base.unflatten(0, batch), rows.unflatten(0, batch), excess[:, None]
    return torch.addcmul(base, rows, excess, out=None if out is None else out.unflatten(0, batch)).flatten(0, 1)


def times_excess(rows: Tensor, excess: Tensor) -> Tensor:
    """(k - 1) rows, (M, O)."""
    if excess.dim() == 1:
        return rows * excess
    return (rows.unflatten(0, (excess.shape[0], -1)) * excess[:, None]).flatten(0, 1)


def gradient(adapter: Adapter, kept: KeptOfMagnitude, dy: Tensor) -> Tensor:
    """dm (N, O) fp32 of dy (M, O), which is not multiplied by k yet."""
    output, divisor = kept.output, kept.divisor
    assert output is not None
    if dy.shape[0] == 0:
        return torch.zeros_like(divisor)
    if not isinstance(adapter.scale, RowChoice):
        return magnitude_gradient(dy, output, divisor[0])[None]
    rows, num_adapters = adapter.scale.rows, divisor.shape[0]
    batch = (rows.shape[0], dy.shape[0] // rows.shape[0])
    parts = zip(dy.unflatten(0, batch), output.unflatten(0, batch), _of_rows(divisor, rows, otherwise=1.0), strict=True)
    of_rows = torch.stack([magnitude_gradient(*part) for part in parts])
    own = rows == torch.arange(num_adapters, device=rows.device)[:, None]
    return torch.where(own[:, :, None], of_rows, 0.0).sum(dim=1)
