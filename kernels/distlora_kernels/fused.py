"""Multiply with a quantized weight that is decoded inside the product, and choose when to do so.

No dequantized weight is ever in memory. The weight is decoded once per tile of rows (128 at most), so it pays for few
rows; for more it is cheaper to dequantize once into the scratch and call the library's GEMM.

Letters: M rows, I in features, O out features, R rank, G groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from distlora_kernels.dispatch import compute_capability, on_device_of
from distlora_kernels.formats.nf4 import Nf4
from distlora_kernels.fused_threshold import max_fused_rows
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.reference import BLOCK

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
    """
    m, (o, i) = x.shape[0], weight.shape
    _check_weight(x, i, weight)
    _check_pair(xa, None if b is None else b.T, (m, o), x.dtype)
    assert addend is None or addend.shape == (m, o), f"addend {tuple(addend.shape)}"
    assert bias is None or bias.shape == (o,), f"bias {tuple(bias.shape)}"
    from distlora_kernels import fused_triton

    addend, b, bias = (None if tensor is None else tensor.contiguous() for tensor in (addend, b, bias))
    xa = xa if xa is None or xa.stride(1) == 1 else xa.contiguous()
    with on_device_of(x):
        return fused_triton.linear(x.contiguous(), weight.parts, o, addend=addend, xa=xa, b=b, bias=bias)


def fused_linear_dx(dy: Tensor, weight: FrozenWeight, *, dxa: Tensor | None = None, a: Tensor | None = None) -> Tensor:
    """Return dx = dy W + dxa a, (M, I) in dy's dtype, summed in fp32 and rounded once. No gradient.

    Shapes: dy (M, O), dxa (M, R), a (R, I), all in dy's dtype.
    """
    m, (o, i) = dy.shape[0], weight.shape
    _check_weight(dy, o, weight)
    _check_pair(dxa, a, (m, i), dy.dtype)
    from distlora_kernels import fused_triton

    dxa, a = (None if tensor is None else tensor.contiguous() for tensor in (dxa, a))
    with on_device_of(dy):
        return fused_triton.dx(dy.contiguous(), weight.parts, i, dxa=dxa, a=a)


def _check_weight(rows: Tensor, columns: int, weight: FrozenWeight) -> None:
    """Assert that a quantized weight fits the rows: the kernels would read beyond what is smaller."""
    (_, i), parts = weight.shape, weight.parts
    assert supports(weight.shape), f"a fused product needs rows of whole blocks of {BLOCK}, got I = {i}"
    assert rows.dtype in _DTYPES, f"a fused product takes {_DTYPES}, not {rows.dtype}"
    assert tuple(rows.shape[1:]) == (columns,), f"{tuple(rows.shape)}, a weight {weight.shape}"
    assert isinstance(weight.format, Nf4), f"a fused product takes NF4, not {weight.format}"
    weight.format.check(parts, weight.shape)
    assert all(part.is_contiguous() and part.device == rows.device for part in parts), f"parts on {rows.device}"


def _check_pair(left: Tensor | None, right: Tensor | None, ends: tuple[int, int], dtype: torch.dtype) -> None:
    """Assert that left (M, R) and right (R, N) have one rank, and `ends` (M, N)."""
    if left is None or right is None:
        assert left is right is None, "both or none"
        return
    assert left.shape[1] == right.shape[0], f"{tuple(left.shape)}, {tuple(right.shape)}"
    assert (left.shape[0], right.shape[1]) == ends, f"{tuple(left.shape)}, {tuple(right.shape)}"
    assert left.dtype == right.dtype == dtype, f"{left.dtype}, {right.dtype}"


Variant = Literal["scratch", "fused"]

_forced: Variant | None = None


def variant_by_rows(capability: tuple[int, int], m: int, o: int, i: int) -> Variant:
    """Return the variant for M rows and a quantized weight (O, I). Both costs are proportional to O I."""
    if not supports((o, i)):
        return "scratch"
    return "fused" if m <= max_fused_rows(capability) else "scratch"


def choose_variant(rows: Tensor, weight: FrozenWeight) -> Variant:
    """Return the variant for rows (M, I), or (M, O) of a gradient, on their device.

    Weights that are not in NF4, fp32 (slow in Triton without TF32) and fp64 (not supported) use the library's GEMM.
    """
    if not weight.is_nf4:
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
