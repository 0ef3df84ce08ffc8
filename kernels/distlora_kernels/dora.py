"""DoRA (Liu et al., arXiv 2402.09353): the norms of the rows of W + s B A without making it, and the gradient of the
magnitudes.

    y = (m / n) * (x W^T + s (x A^T) B^T),   n_o = ||W_o + s (B A)_o||, without gradient (the paper's section 4.3)
    n_o^2 = ||W_o||^2 + 2 s <(W A^T)_o, B_o> + s^2 <(B A A^T)_o, B_o>
    dm_o = sum over rows of dy_o (y_o / m_o)

||W_o||^2 never changes. W A^T is the base applied to the rows of A: M = R rows through the frozen linear. The rest is
(O, R). With B = 0 the last two terms are exactly 0, so n is the root of ||W_o||^2, correctly rounded; so is m where it
starts, and m / n is exactly 1.

Letters: M rows of the input, I in features, O out features, R adapter rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels import dora_reference
from distlora_kernels.dispatch import check, register, uses_triton
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.reference import BLOCK


def initial_magnitude(row_norms_squared: Tensor) -> Tensor:
    """m at the start: (O,) fp32, to the bit what dora_norms gives for B = 0."""
    return dora_reference.root(row_norms_squared)


@torch.no_grad()
def dora_norms(row_norms_squared: Tensor, wa: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The norms n: (O,) fp32 of row_norms_squared (O,) fp32, wa = W A^T (O, R), a (R, I), b (O, R) and the scale s.

    wa, a and b are fp32, bf16 or fp16 and are widened; everything is computed in fp32, and a sum that rounding made
    negative counts as 0. No gradient. Raises RuntimeError for shapes that do not fit each other.
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
    # In fp64, whatever a script has set for fp32 (TF32): R is small.
    gram = (a.double() @ a.double().T).float()
    return _dora_norms(row_norms_squared.contiguous(), wa.contiguous(), gram, b.contiguous(), scale)


def _fake_norms(row_norms_squared: Tensor, wa: Tensor, gram: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(row_norms_squared)


@register(
    "dora_norms(Tensor row_norms_squared, Tensor wa, Tensor gram, Tensor b, float scale) -> Tensor", fake=_fake_norms
)
def _dora_norms(row_norms_squared: Tensor, wa: Tensor, gram: Tensor, b: Tensor, scale: float) -> Tensor:
    if not uses_triton(b):
        return dora_reference.dora_norms(row_norms_squared, wa, gram, b, scale)
    from distlora_kernels import dora_triton

    return dora_triton.dora_norms(row_norms_squared, wa, gram, b, scale)


def scaled_rows(weight: FrozenWeight, factor: Tensor) -> FrozenWeight:
    """diag(factor) W of a packed W, packed: factor (O,) fp32 is multiplied into the absmax, in fp32.

    So the product is rounded once, where it is dequantized; a factor of 1 changes no bit. Raises RuntimeError for a
    dense weight, and where a row is not whole blocks of 64.
    """
    rows, columns = weight.shape
    check(weight.packed and columns % BLOCK == 0, lambda: f"a weight {weight.shape} has no absmax for each row")
    check(
        factor.shape == (rows,) and factor.dtype == torch.float32,
        lambda: f"{rows} rows are scaled by {rows} fp32 numbers, not {tuple(factor.shape)} {factor.dtype}",
    )
    return FrozenWeight((weight.parts[0], _scaled_absmax(list(weight.parts), rows, columns, factor)), weight.shape)


def _fake_absmax(parts: list[Tensor], rows: int, columns: int, factor: Tensor) -> Tensor:
    return torch.empty_like(parts[1], dtype=torch.float32)


@register("dora_scaled_absmax(Tensor[] parts, SymInt rows, SymInt columns, Tensor factor) -> Tensor", fake=_fake_absmax)
def _scaled_absmax(parts: list[Tensor], rows: int, columns: int, factor: Tensor) -> Tensor:
    if not uses_triton(parts[0]):
        return dora_reference.scaled_absmax(parts, rows, columns, factor)
    from distlora_kernels import dora_triton

    return dora_triton.scaled_absmax(parts, rows, columns, factor)


@torch.no_grad()
def dy_gradients(
    dy: Tensor, b: Tensor, xa: Tensor, y: Tensor, magnitude: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """skinny_dy's (dxa, db) and magnitude_gradient's dm, of one reading of dy where skinny_dy reads it once.

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
        lambda: f"operands must have one dtype, the magnitude fp32; got {[t.dtype for t in (dy, y, b, xa, magnitude)]}",
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
        return dy @ b, db, dora_reference.magnitude_gradient(dy, y, magnitude)
    from distlora_kernels import dora_triton, skinny_launch

    dxa, db, stripes = skinny_launch.dy(dy, b, xa, scale, None, (), (), y=y)
    if stripes is None:
        return dxa, db, dora_triton.magnitude_gradient(dy.contiguous(), y.contiguous(), magnitude)
    return dxa, db, dora_triton.add_stripes(stripes, magnitude)


@torch.no_grad()
def magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    """dm: (O,) fp32 of dy and y (M, O), the output without its bias, and the magnitude (O,) fp32.

    Products and sums are fp32, in an order that depends on M alone; dy and y are read once. Where the magnitude is 0, y
    says nothing about it and its gradient is 0. Raises RuntimeError for shapes or dtypes that do not fit.
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
        return dora_reference.magnitude_gradient(dy, y, magnitude)
    from distlora_kernels import dora_triton

    return dora_triton.magnitude_gradient(dy, y, magnitude)
