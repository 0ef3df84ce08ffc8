"""Compute DoRA's row norms and magnitude gradients (Liu et al., arXiv 2402.09353) without forming W + s B A.

    y = (m / n) * (x W^T + s (x A^T) B^T),   n_o = ||W_o + s (B A)_o||, without gradient (section 4.3 of the paper)
    n_o^2 = ||W_o||^2 + 2 s <(W A^T)_o, B_o> + s^2 <(B A A^T)_o, B_o>
    dm_o = sum over rows of dy_o (y_o / m_o)

||W_o||^2 is constant. W A^T is the base applied to the R rows of A. All else is (O, R). With B = 0 the last two terms
of n_o^2 are exactly 0, so n equals the initial m bit for bit and m / n is exactly 1.

Letters: M rows of the input, I in features, O out features, R adapter rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.dispatch import check, register, uses_triton
from distlora_kernels.operands import FrozenWeight
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

    Raises:
        RuntimeError: Shapes or dtypes do not fit each other.
    """
    rank, rows = a.shape[0], b.shape[0]
    check(
        wa.shape == b.shape == (rows, rank) and row_norms_squared.shape == (rows,),
        lambda: (
            f"W A^T and B must be (O, R) with R = {rank} and the row norms (O,); got W A^T {tuple(wa.shape)}, "
            f"B {tuple(b.shape)}, row norms {tuple(row_norms_squared.shape)}"
        ),
    )
    check(row_norms_squared.dtype == torch.float32, lambda: f"row norms are fp32, not {row_norms_squared.dtype}")
    # In fp64, so that TF32 settings do not matter: R is small.
    gram = (a.double() @ a.double().T).float()
    return _dora_norms(row_norms_squared.contiguous(), wa.contiguous(), gram, b.contiguous(), scale)


def _fake_norms(row_norms_squared: Tensor, wa: Tensor, gram: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(row_norms_squared)


@register(
    "dora_norms(Tensor row_norms_squared, Tensor wa, Tensor gram, Tensor b, float scale) -> Tensor", fake=_fake_norms
)
def _dora_norms(row_norms_squared: Tensor, wa: Tensor, gram: Tensor, b: Tensor, scale: float) -> Tensor:
    if not uses_triton(b):
        return reference.dora_norms(row_norms_squared, wa, gram, b, scale)
    from distlora_kernels import dora_triton

    return dora_triton.dora_norms(row_norms_squared, wa, gram, b, scale)


def scaled_rows(weight: FrozenWeight, factor: Tensor) -> FrozenWeight:
    """Return diag(factor) W for a quantized W, quantized: factor (O,) fp32 is multiplied into the absmax in fp32.

    The product is rounded once, when it is dequantized; a factor of 1 changes no bit. Raises RuntimeError for a dense
    weight and for rows that are not whole blocks of 64.
    """
    rows, columns = weight.shape
    check(weight.quantized and columns % BLOCK == 0, lambda: f"a weight {weight.shape} has no absmax per row")
    check(
        factor.shape == (rows,) and factor.dtype == torch.float32,
        lambda: f"the factor of {rows} rows must be ({rows},) fp32, not {tuple(factor.shape)} {factor.dtype}",
    )
    return FrozenWeight((weight.parts[0], _scaled_absmax(list(weight.parts), rows, columns, factor)), weight.shape)


def _fake_absmax(parts: list[Tensor], rows: int, columns: int, factor: Tensor) -> Tensor:
    return torch.empty_like(parts[1], dtype=torch.float32)


@register("dora_scaled_absmax(Tensor[] parts, SymInt rows, SymInt columns, Tensor factor) -> Tensor", fake=_fake_absmax)
def _scaled_absmax(parts: list[Tensor], rows: int, columns: int, factor: Tensor) -> Tensor:
    if not uses_triton(parts[0]):
        return reference.scaled_absmax(parts, rows, columns, factor)
    from distlora_kernels import dora_triton

    return dora_triton.scaled_absmax(parts, rows, columns, factor)


@torch.no_grad()
def dy_gradients(
    dy: Tensor, b: Tensor, xa: Tensor, y: Tensor, magnitude: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return skinny_dy's (dxa, db) and magnitude_gradient's dm, reading dy once where skinny_dy does.

    Raises RuntimeError for shapes or dtypes that do not fit.
    """
    rank = b.shape[1]
    check(
        dy.dim() == 2
        and dy.shape == y.shape == (xa.shape[0], b.shape[0])
        and xa.shape[1] == rank
        and magnitude.shape == dy.shape[1:],
        lambda: (
            f"dy and y must be (M, O), b (O, R), xa (M, R) and the magnitude (O,); got {tuple(dy.shape)}, "
            f"{tuple(y.shape)}, {tuple(b.shape)}, {tuple(xa.shape)}, {tuple(magnitude.shape)}"
        ),
    )
    check(
        dy.dtype == y.dtype == b.dtype == xa.dtype and magnitude.dtype == torch.float32,
        lambda: (
            f"operands must have one dtype and the magnitude fp32; got {[t.dtype for t in (dy, y, b, xa, magnitude)]}"
        ),
    )
    result: tuple[Tensor, Tensor, Tensor] = _dy_gradients(dy, b, xa, y, magnitude.contiguous(), scale)
    return result


@register(
    "dora_dy_gradients(Tensor dy, Tensor b, Tensor xa, Tensor y, Tensor magnitude, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dy, b, xa, y, magnitude, scale: (
        torch.empty_like(xa, memory_format=torch.contiguous_format),
        b.new_empty(b.shape, dtype=torch.float32),
        torch.empty_like(magnitude),
    ),
)
def _dy_gradients(
    dy: Tensor, b: Tensor, xa: Tensor, y: Tensor, magnitude: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not uses_triton(dy):
        db = (dy.T.float() @ xa.float()).mul_(scale)
        return dy @ b, db, reference.magnitude_gradient(dy, y, magnitude)
    from distlora_kernels import dora_triton, skinny_launch

    dxa, db, stripes = skinny_launch.dy(dy, b, xa, scale, None, (), (), y=y)
    if stripes is None:
        return dxa, db, dora_triton.magnitude_gradient(dy.contiguous(), y.contiguous(), magnitude)
    return dxa, db, dora_triton.add_stripes(stripes, magnitude)


@torch.no_grad()
def magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    """Return dm, (O,) fp32, from dy (M, O), the output y (M, O) without its bias, and the magnitude (O,) fp32.

    Products and sums are fp32, in an order that depends on M only; dy and y are read once. The gradient of a magnitude
    of 0 is 0. Raises RuntimeError for shapes or dtypes that do not fit.
    """
    check(
        dy.dim() == 2 and dy.shape == y.shape and magnitude.shape == dy.shape[1:],
        lambda: (
            f"dy and y must be (M, O) and the magnitude (O,); got {tuple(dy.shape)}, {tuple(y.shape)}, "
            f"{tuple(magnitude.shape)}"
        ),
    )
    check(
        dy.dtype == y.dtype and magnitude.dtype == torch.float32,
        lambda: f"dy and y must have one dtype, the magnitude fp32; got {dy.dtype}, {y.dtype}, {magnitude.dtype}",
    )
    return _magnitude_gradient(dy.contiguous(), y.contiguous(), magnitude.contiguous())


def _fake_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    return torch.empty_like(magnitude)


@register("dora_magnitude_gradient(Tensor dy, Tensor y, Tensor magnitude) -> Tensor", fake=_fake_gradient)
def _magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    if not uses_triton(dy):
        return reference.magnitude_gradient(dy, y, magnitude)
    from distlora_kernels import dora_triton

    return dora_triton.magnitude_gradient(dy, y, magnitude)
