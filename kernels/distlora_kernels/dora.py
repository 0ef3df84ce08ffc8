"""Compute DoRA's row norms and magnitude gradients (Liu et al., arXiv 2402.09353) without forming W + s B A.

    y = (m / n) * (x W^T + s (x A^T) B^T),   n_o = ||W_o + s (B A)_o||, without gradient (section 4.3 of the paper)
    n_o^2 = ||W_o||^2 + 2 s <(W A^T)_o, B_o> + s^2 <(B A A^T)_o, B_o>
    dm_o = sum over rows of dy_o (y_o / m_o)

||W_o||^2 is constant. W A^T is the base applied to the R rows of A. All else is (O, R). With B = 0 the last two terms
of n_o^2 are exactly 0, so n equals the initial m bit for bit and m / n is exactly 1.

In the adapted linear, on both paths, with the factors k = m / n and the dropout d of dropout.py:

    v = d(x) W^T + s (d(x) A^T) B^T       (M, O); d is the dropout of dropout.py
    y = k v + bias                        without dropout, where d(x) = x
    y = x W^T + (k - 1) d(x) W^T + k s (d(x) A^T) B^T + bias = x W^T + (v - d(x) W^T) + (k - 1) v + bias

The last line is PEFT's formula: an input that the adapter does not see is not scaled either, but the base sees it. In
backward k is constant but for m (section 4.3 of the paper), so
    dm = sum over rows of dy v / n = sum over rows of dy (k v) / m,
and all else follows lora_linear.py with k dy in place of dy.

k - 1 is applied, as y + (k - 1) y: it is exactly 0 at the start, and in bf16 it keeps 8 bits of the change of m. Rows
without an adapter have k = 1.

If one adapter without dropout has all rows and the weight is quantized, k can be folded into W and B:
y = x (k W)^T + s (x A^T) (k B)^T + bias is a LoRA. Its output is not read again to be scaled, and k is applied before W
is rounded, so a small change of m is not lost in a rounded bf16 output.

A row of W that is 0 has k = 1 and dm = 0, and trains as a LoRA's: its m starts at 0, and k = m / n would hold it at 0.
The norms below are 0 for such a row.

Letters: B rows of the batch, M rows of the flattened input, I in features, O out features, N adapters, R their ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels import fused, reference
from distlora_kernels.dispatch import on_device_of, uses_triton
from distlora_kernels.formats.nf4 import NF4_ABSMAX
from distlora_kernels.operands import Adapter, FrozenWeight, Linear, RowChoice, SavedDora
from distlora_kernels.reference import BLOCK


def initial_magnitude(row_norms_squared: Tensor) -> Tensor:
    """Return the initial m, (O,) fp32: the bits that dora_norms returns for B = 0."""
    return reference.root(row_norms_squared)


@torch.no_grad()
def dora_norms(row_norms_squared: Tensor, wa: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the norms n, (O,) fp32, without gradient.

    wa, a and b are widened to fp32. A sum that rounding made negative counts as 0.

    Args:
        row_norms_squared: ||W_o||^2, (O,) fp32.
        wa: W A^T, (O, R) fp32, bf16 or fp16.
        a: (R, I).
        b: (O, R).
        scale: The adapter's scale s.

    """
    assert wa.shape == b.shape == (*row_norms_squared.shape, a.shape[0]), f"{wa.shape}, {b.shape}, {a.shape}"
    assert row_norms_squared.dtype == torch.float32, row_norms_squared.dtype
    # In fp64, so that TF32 settings do not matter: R is small.
    gram = (a.double() @ a.double().T).float()
    squares, wa, b = row_norms_squared.contiguous(), wa.contiguous(), b.contiguous()
    if not uses_triton(b):
        return reference.dora_norms(squares, wa, gram, b, scale)
    from distlora_kernels import dora_triton

    with on_device_of(b):
        return dora_triton.dora_norms(squares, wa, gram, b, scale)


def scaled_rows(weight: FrozenWeight, factor: Tensor) -> FrozenWeight:
    """Return diag(factor) W for a W in NF4, in NF4: factor (O,) fp32 is multiplied into the absmax in fp32.

    The product is rounded once, when it is dequantized; a factor of 1 changes no bit.
    """
    (rows, columns), parts = weight.shape, list(weight.parts)
    assert weight.is_nf4, "no other format has an absmax to scale"
    assert columns % BLOCK == 0, f"rows of {columns} are not whole blocks"
    assert (factor.shape, factor.dtype) == ((rows,), torch.float32), f"{tuple(factor.shape)} {factor.dtype}"
    from distlora_kernels import dora_triton

    with on_device_of(parts[0]):
        scaled = dora_triton.scaled_absmax(parts, rows, columns, factor)
    return FrozenWeight((parts[0], scaled), weight.shape, NF4_ABSMAX)


@torch.no_grad()
def dy_gradients(
    dy: Tensor, b: Tensor, xa: Tensor, y: Tensor, magnitude: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return skinny_dy's (dxa, db) and magnitude_gradient's dm, reading dy once where skinny_dy does."""
    shapes = [tuple(tensor.shape) for tensor in (dy, b, xa, y, magnitude)]
    assert dy.shape == y.shape == (xa.shape[0], b.shape[0]), shapes
    assert xa.shape[1] == b.shape[1], shapes
    assert magnitude.shape == dy.shape[1:], shapes
    assert dy.dtype == y.dtype == b.dtype == xa.dtype, f"{dy.dtype}, {y.dtype}, {b.dtype}, {xa.dtype}"
    magnitude = magnitude.contiguous()
    from distlora_kernels import dora_triton, skinny

    with on_device_of(dy):
        dxa, db, stripes = skinny.dy_products(dy, b, xa, scale, None, y=y)
        if stripes is None:
            return dxa, db, dora_triton.magnitude_gradient(dy.contiguous(), y.contiguous(), magnitude)
        return dxa, db, dora_triton.add_stripes(stripes, magnitude)


@torch.no_grad()
def magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    """Return dm, (O,) fp32, from dy (M, O), the output y (M, O) without its bias, and the magnitude (O,) fp32.

    Products and sums are fp32, in an order that depends on M only; dy and y are read once. The gradient of a magnitude
    of 0 is 0.
    """
    assert dy.shape == y.shape == (dy.shape[0], *magnitude.shape), f"{dy.shape}, {y.shape}, {magnitude.shape}"
    assert dy.dtype == y.dtype, f"{dy.dtype}, {y.dtype}"
    assert magnitude.dtype == torch.float32, magnitude.dtype
    dy, y, magnitude = dy.contiguous(), y.contiguous(), magnitude.contiguous()
    if not uses_triton(dy):
        return reference.magnitude_gradient(dy, y, magnitude)
    from distlora_kernels import dora_triton

    with on_device_of(dy):
        return dora_triton.magnitude_gradient(dy, y, magnitude)


class DoraFactors(NamedTuple):
    """The factors k of a linear's outputs."""

    norms: Tensor
    """n, (N, O) fp32; 0 for a row of W or of W + s B A that is 0, whose k is 1."""
    excess: Tensor
    """k - 1, (O,), or (B, O) if rows choose among adapters."""


def factors(adapter: Adapter, wa: Tensor, dtype: torch.dtype) -> DoraFactors:
    """Return the factors for wa = W A^T (O, R), with k - 1 in `dtype`."""
    magnitude = adapter.magnitude
    assert magnitude is not None
    squares, a = magnitude.row_norms_squared, adapter.down(dtype)
    if not isinstance(adapter.scale, RowChoice):
        norms = _zero_for_zero_rows(squares, dora_norms(squares, wa, a, adapter.b, adapter.scale)[None])
        return DoraFactors(norms, _excess(magnitude.masters, norms)[0].to(dtype))
    choice, parts = adapter.scale, []
    for number, scale in enumerate(choice.scales):
        columns = choice.columns(number)
        parts.append(dora_norms(squares, wa[:, columns], a[columns], adapter.b[:, columns], scale))
    norms = _zero_for_zero_rows(squares, torch.stack(parts))
    excess = _excess(magnitude.masters, norms)
    return DoraFactors(norms, _by_row(excess, choice.rows, otherwise=0.0).to(dtype))


def _zero_for_zero_rows(row_norms_squared: Tensor, norms: Tensor) -> Tensor:
    return torch.where(row_norms_squared == 0, 0.0, norms)


def can_fold(adapter: Adapter, weight: FrozenWeight, dtype: torch.dtype) -> bool:
    """Return whether k can be folded into the weight: into NF4's absmax."""
    plain = adapter.dropout is None and not isinstance(adapter.scale, RowChoice)
    return plain and weight.is_nf4 and fused.supports(weight.shape) and dtype in (torch.bfloat16, torch.float16)


def folded(linear: Linear, factor: Tensor) -> Linear:
    """Return the LoRA that computes the linear's output with k = factor (O,) fp32."""
    adapter = linear.adapter
    assert adapter is not None
    adapter = adapter._replace(b=adapter.b * factor[:, None], magnitude=None, copies=None)
    return linear._replace(weight=scaled_rows(linear.weight, factor), adapter=adapter)


def scaled(adapter: Adapter, factors: DoraFactors, y: Tensor, bias: Tensor | None) -> tuple[Tensor, SavedDora]:
    """Overwrite y = v + bias (M, O) with k v + bias, without dropout. Returns it and the tensors for backward."""
    if bias is None:
        y = plus_excess(y, y, factors.excess, out=y)
        return y, SavedDora(y, _divisor_of_scaled(adapter, factors), factors.excess)
    # y has the bias in its sum, as the base has, so that k = 1 changes no bit; the bias is not scaled.
    output = y - bias
    y = plus_excess(y, output, factors.excess, out=y)
    return y, SavedDora(output, factors.norms, factors.excess)


def scaled_with_dropout(
    factors: DoraFactors, delta: Tensor, output: Tensor, bias: Tensor | None
) -> tuple[Tensor, SavedDora]:
    """Overwrite delta = s (d(x) A^T) B^T (M, O) with the term that is added to x W^T; `output` is v."""
    rest = plus_excess(delta, output, factors.excess, out=delta)
    return rest if bias is None else rest.add_(bias), SavedDora(output, factors.norms, factors.excess)


def saved_for_folded(
    linear: Linear, factors: DoraFactors, factor: Tensor, y: Tensor, *, with_backward: bool
) -> SavedDora:
    """Return the tensors that backward needs from y (M, O), the output of folded(linear, factor)."""
    assert linear.adapter is not None
    output: Tensor | None = y
    if linear.bias is not None:
        output = y - linear.bias if with_backward else None
    return SavedDora(output, _divisor_of_scaled(linear.adapter, factors), None, factor)


def _divisor_of_scaled(adapter: Adapter, factors: DoraFactors) -> Tensor:
    """Return the divisor of the sum of dy (k v) that gives dm, (N, O) fp32: m, or 0 where n is 0."""
    assert adapter.magnitude is not None
    return torch.where(factors.norms == 0, 0.0, adapter.magnitude.masters)


def _excess(masters: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms == 0, 0.0, masters / norms - 1)


def _by_row(values: Tensor, rows: Tensor, *, otherwise: float) -> Tensor:
    """Return values (N, O) by row, (B, O); `otherwise` for rows without an adapter (-1)."""
    return torch.cat([values, torch.full_like(values[:1], otherwise)])[rows]


def plus_excess(base: Tensor, rows: Tensor, excess: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return base + (k - 1) rows, (M, O), rounded once; `out` may be either operand."""
    if excess.dim() == 1:
        return torch.addcmul(base, rows, excess, out=out)
    batch = (excess.shape[0], base.shape[0] // excess.shape[0])
    base, rows, excess = base.unflatten(0, batch), rows.unflatten(0, batch), excess[:, None]
    return torch.addcmul(base, rows, excess, out=None if out is None else out.unflatten(0, batch)).flatten(0, 1)


def times_excess(rows: Tensor, excess: Tensor) -> Tensor:
    """Return (k - 1) rows, (M, O)."""
    if excess.dim() == 1:
        return rows * excess
    return (rows.unflatten(0, (excess.shape[0], -1)) * excess[:, None]).flatten(0, 1)


def gradient(adapter: Adapter, saved: SavedDora, dy: Tensor) -> Tensor:
    """Return dm (N, O) fp32 from dy (M, O), not yet multiplied by k."""
    output, divisor = saved.output, saved.divisor
    assert output is not None
    if dy.shape[0] == 0:
        return torch.zeros_like(divisor)
    if not isinstance(adapter.scale, RowChoice):
        return magnitude_gradient(dy, output, divisor[0])[None]
    rows, num_adapters = adapter.scale.rows, divisor.shape[0]
    batch = (rows.shape[0], dy.shape[0] // rows.shape[0])
    parts = zip(dy.unflatten(0, batch), output.unflatten(0, batch), _by_row(divisor, rows, otherwise=1.0), strict=True)
    by_row = torch.stack([magnitude_gradient(*part) for part in parts])
    uses = rows == torch.arange(num_adapters, device=rows.device)[:, None]
    return torch.where(uses[:, :, None], by_row, 0.0).sum(dim=1)
