"""Contract of the products that decode a packed weight as they go: no dequantized weight is ever in memory.

For few rows: the weight is decoded once for each tile of them (128 at most), so from some M on it is cheaper to
dequantize it once and to let a library multiply. variants.py says which.

Letters: M rows, I in features, O out features, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distlora_kernels.dispatch import check, register, uses_triton
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP_BYTES, num_groups

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(shape: tuple[int, ...]) -> bool:
    """Whether a packed weight (O, I) can be decoded in the product: its blocks must not run over the end of a row."""
    return shape[1] % BLOCK == 0


def fused_linear(
    x: Tensor,
    weight: FrozenWeight,
    *,
    addend: Tensor | None = None,
    xa: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x (M, I) -> y (M, O) in x's dtype = x W^T + xa b^T + addend + bias: summed in fp32, rounded once.

    W is exactly what nf4_dequantize gives in x's dtype. xa (M, R), b (O, R) and addend (M, O) are in x's dtype, b with
    the adapter's scale in it; bias (O,) is in any. Without gradient. RuntimeError for what does not fit.
    """
    m, (o, i) = x.shape[0], weight.shape
    _check_weight(x, i, weight)
    _check_pair("xa, b", xa, b, (m, o), x.dtype, rank_dims=(1, 1))
    for name, tensor, shape in (("addend", addend, (m, o)), ("bias", bias, (o,))):
        check(
            tensor is None or tensor.shape == shape,
            lambda: f"{name} must be {shape}, got {None if tensor is None else tuple(tensor.shape)}",  # noqa: B023
        )
    result: Tensor = _linear(x, list(weight.parts), o, addend, xa, b, bias)
    return result


def fused_linear_dx(dy: Tensor, weight: FrozenWeight, *, dxa: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """dy (M, O) -> dx (M, I) in dy's dtype = dy W + dxa a: summed in fp32, rounded once. dxa (M, R), a (R, I) in dy's
    dtype. Without gradient. RuntimeError for what does not fit.
    """
    m, (o, i) = dy.shape[0], weight.shape
    _check_weight(dy, o, weight)
    _check_pair("dxa, a", dxa, a, (m, i), dy.dtype, rank_dims=(1, 0))
    result: Tensor = _dx(dy, list(weight.parts), i, dxa, a)
    return result


def _check_weight(rows: Tensor, columns: int, weight: FrozenWeight) -> None:
    (o, i), parts = weight.shape, weight.parts
    groups = num_groups(o * i)
    check(supports(weight.shape), lambda: f"a fused product needs rows of whole blocks of {BLOCK}, got I = {i}")
    check(rows.dtype in _DTYPES, lambda: f"a fused product takes {_DTYPES}, not {rows.dtype}", TypeError)
    check(
        rows.dim() == 2 and rows.shape[1] == columns,
        lambda: f"a weight {weight.shape} needs rows of {columns}, got {tuple(rows.shape)}",
    )
    shapes = [(groups, GROUP_BYTES), (groups, BLOCKS_PER_GROUP), (groups,), ()]
    expected = shapes if len(parts) == 4 else shapes[:2]
    check(
        len(parts) in (2, 4) and [tuple(part.shape) for part in parts] == expected,
        lambda: f"a packed weight {weight.shape} has parts {shapes} or {shapes[:2]}, got {[p.shape for p in parts]}",
    )
    for part in parts:
        check(
            part.is_contiguous() and part.device == rows.device,
            lambda: (
                f"a part of the weight is not contiguous on {rows.device}: {part.stride()}, {part.device}"  # noqa: B023
            ),
        )


def _check_pair(
    names: str,
    left: Tensor | None,
    right: Tensor | None,
    ends: tuple[int, int],
    dtype: torch.dtype,
    *,
    rank_dims: tuple[int, int],
) -> None:
    check((left is None) == (right is None), lambda: f"{names} must be given together")
    if left is None or right is None:
        return
    fits = (
        left.dim() == right.dim() == 2
        and left.shape[1] == right.shape[rank_dims[1]]
        and (left.shape[0], right.shape[1 - rank_dims[1]]) == ends
        and left.dtype == right.dtype == dtype
    )
    check(
        fits,
        lambda: (
            f"{names} must be of one rank, {dtype}, and span {ends}; got {tuple(left.shape)} {left.dtype} and "
            f"{tuple(right.shape)} {right.dtype}"
        ),
    )


@register(
    "fused_linear(Tensor x, Tensor[] parts, SymInt out_features, Tensor? addend, Tensor? xa, Tensor? b, Tensor? bias)"
    " -> Tensor",
    fake=lambda x, _, out_features, *_others: x.new_empty(x.shape[0], out_features),
)
def _linear(
    x: Tensor,
    parts: Sequence[Tensor],
    out_features: int,
    addend: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if uses_triton(x):
        from distlora_kernels import fused_triton

        contiguous = [None if tensor is None else tensor.contiguous() for tensor in (addend, xa, b, bias)]
        addend, xa, b, bias = contiguous
        return fused_triton.linear(x.contiguous(), list(parts), out_features, addend=addend, xa=xa, b=b, bias=bias)
    weight = FrozenWeight(tuple(parts), (out_features, x.shape[1])).dense(x.dtype)
    y = x @ weight.T if xa is None or b is None else torch.addmm(xa @ b.T, x, weight.T)
    for term in (addend, bias):
        y = y if term is None else y + term.to(y.dtype)
    return y


@register(
    "fused_linear_dx(Tensor dy, Tensor[] parts, SymInt in_features, Tensor? dxa, Tensor? a) -> Tensor",
    fake=lambda dy, _, in_features, *_others: dy.new_empty(dy.shape[0], in_features),
)
def _dx(dy: Tensor, parts: Sequence[Tensor], in_features: int, dxa: Tensor | None, a: Tensor | None) -> Tensor:
    if uses_triton(dy):
        from distlora_kernels import fused_triton

        dxa, a = (None if tensor is None else tensor.contiguous() for tensor in (dxa, a))
        return fused_triton.dx(dy.contiguous(), list(parts), in_features, dxa=dxa, a=a)
    weight = FrozenWeight(tuple(parts), (dy.shape[1], in_features)).dense(dy.dtype)
    return dy @ weight if dxa is None or a is None else torch.addmm(dxa @ a, dy, weight)
