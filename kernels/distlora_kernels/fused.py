"""Multiply with a quantized weight that is decoded inside the product, and choose when to do so.

No dequantized weight is ever in memory. The weight is decoded once per tile of rows (128 at most), so it pays for few
rows; for more it is cheaper to dequantize once into the scratch and call the library's GEMM.

Letters: M rows, I in features, O out features, R rank, G groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from distlora_kernels.dispatch import check, compute_capability, register, uses_triton
from distlora_kernels.fused_threshold import max_fused_rows
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP_BYTES, num_groups

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(shape: tuple[int, ...]) -> bool:
    """Return whether a quantized weight (O, I) can be decoded in the product: rows must be whole blocks."""
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
    """Return y = x W^T + xa b^T + addend + bias, (M, O) in x's dtype, summed in fp32 and rounded once.

    W equals nf4_dequantize in x's dtype bit for bit. No gradient.

    Args:
        x: (M, I).
        weight: Quantized (O, I).
        addend: (M, O) in x's dtype.
        xa: (M, R) in x's dtype.
        b: (O, R) in x's dtype, with the adapter's scale multiplied in.
        bias: (O,), of any dtype.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
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
    """Return dx = dy W + dxa a, (M, I) in dy's dtype, summed in fp32 and rounded once. No gradient.

    Shapes: dy (M, O), dxa (M, R), a (R, I), all in dy's dtype. Raises RuntimeError for shapes or dtypes that do not
    fit.
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
        lambda: f"a quantized weight {weight.shape} has parts {shapes} or {shapes[:2]}, got {[p.shape for p in parts]}",
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


Variant = Literal["scratch", "fused"]

_forced: Variant | None = None


def variant_by_rows(capability: tuple[int, int], m: int, o: int, i: int) -> Variant:
    """Return the variant for M rows and a quantized weight (O, I). Both costs are proportional to O I."""
    if not supports((o, i)):
        return "scratch"
    return "fused" if m <= max_fused_rows(capability) else "scratch"


def choose_variant(rows: Tensor, weight: FrozenWeight) -> Variant:
    """Return the variant for rows (M, I), or (M, O) of a gradient, on their device.

    Dense weights, fp32 (slow in Triton without TF32) and fp64 (not supported) use the library's GEMM.
    """
    if not weight.quantized:
        return "scratch"
    if _forced is not None:
        return _forced
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return "scratch"
    return variant_by_rows(compute_capability(rows.device), rows.shape[0], *weight.shape)


@contextlib.contextmanager
def force_variant(variant: Variant) -> Iterator[None]:
    """Use this variant for every quantized weight, for benchmarks and tests."""
    global _forced
    assert _forced is None, f"the variant {_forced!r} is already forced"
    _forced = variant
    try:
        yield
    finally:
        _forced = None
