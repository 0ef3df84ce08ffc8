"""Multiply matrices on the CPU, in bf16 with fp32 sums, on the path of this process (processor.py).

`product` is torch's where the processor multiplies bf16 fast, and for other dtypes. Elsewhere products.cpp computes it
in a compiled run (`use`); without a compiler it is torch's fp32 product of operands that are widened block by block.

Letters: M rows, K summed, N columns.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels import native, nf4_cpu, processor
from distlora_kernels.elementwise import call
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.processor import BLOCK, WIDENED_BYTES
from distlora_kernels.reference import NF4_LEVELS

LONG = 8192
"""Summed elements of the longest product that products.cpp computes."""

_enabled = False


def use(enabled: bool) -> bool:
    """Turn compiled products on for this process, where its path has them, or off. Returns whether they are on."""
    global _enabled
    _enabled = enabled and processor.path() != "amx" and bool(native.library().multiplies())
    return _enabled


def reserve(wanted: bool = True) -> None:
    """Allocate this thread's memory for widened blocks, where its path has them, or free it if it is not `wanted`."""
    if not wanted:
        _blocks.memory = None
    elif processor.widens() and _blocks.memory is None:
        _blocks.memory = torch.empty(WIDENED_BYTES // 4, dtype=torch.float32)


def is_used() -> bool:
    """Return whether compiled products are on."""
    return _enabled


class Term(ctypes.Structure):
    """products.cpp's Term."""

    _fields_ = (
        *(("left", ctypes.c_void_p), ("left_stride", ctypes.c_size_t), ("summed", ctypes.c_size_t)),
        *(("dense", ctypes.c_void_p), ("dense_stride", ctypes.c_size_t)),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "group_scale", "offset", "absmax")),
        *(("levels", ctypes.c_void_p), ("map", ctypes.c_void_p), ("panels", ctypes.c_void_p)),
    )


class _Output(ctypes.Structure):
    """products.cpp's Output."""

    _fields_ = (
        *(("rows", ctypes.c_void_p), ("stride", ctypes.c_size_t), ("columns", ctypes.c_size_t)),
        *(("bias", ctypes.c_void_p), ("added", ctypes.c_void_p), ("added_stride", ctypes.c_size_t)),
        ("factor", ctypes.c_float),
    )


class Factor(NamedTuple):
    """left (M, K) and a weight (N, K), or (K, N) if the product is transposed."""

    left: Tensor
    weight: FrozenWeight | Tensor

    def term(self) -> Term:
        """Return what products.cpp reads. The tensors must outlive it."""
        term = Term(self.left.data_ptr(), self.left.stride(0), self.left.shape[1])
        if isinstance(self.weight, Tensor):
            term.dense, term.dense_stride = self.weight.data_ptr(), self.weight.stride(0)
            return term
        parts = [part.data_ptr() for part in self.weight.parts]
        if len(parts) == 1:
            term.dense, term.dense_stride = parts[0], self.weight.shape[1]
            return term
        term.levels, term.map = _levels().data_ptr(), nf4_cpu.dynamic_map().data_ptr()
        if len(parts) == 2:
            term.codes, term.absmax = parts
        else:
            term.codes, term.scales, term.group_scale, term.offset = parts
        return term


@functools.cache
def _levels() -> Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float32)


def weighted_sum(
    terms: Sequence[Term],
    out: Tensor,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Write factor * (the sum of the terms' products) + bias (N,) + added (M, N) to out (M, N), and return it."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (bias, added)]
    stride = 0 if added is None else added.stride(0)
    output = _Output(out.data_ptr(), out.stride(0), out.shape[1], *pointers, stride, factor)
    listed = (Term * len(terms))(*terms)
    if not call("weighted_sum", out.dtype, listed, len(terms), transposed, ctypes.byref(output), len(out)):
        raise MemoryError(f"no memory for products of {out.shape[1]:,} columns")
    return out


def product(
    left: Tensor, right: Tensor, *, add: Tensor | None = None, factor: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return add + factor * left right, (M, N) or in batches (B, M, N), rounded once; no gradient on a widening path.

    `add` is (N,) or like the result, and may be `out`.
    """
    if left.dtype != torch.bfloat16 or left.device.type != "cpu" or not processor.widens():
        if add is None and factor == 1.0:
            return (torch.mm if left.dim() == 2 else torch.bmm)(left, right, out=out)
        multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
        if add is None:
            add = left.new_empty(()) if out is None else out
            return multiply(add, left, right, beta=0, alpha=factor, out=out)
        return multiply(add, left, right, alpha=factor, out=out)
    if out is None:
        out = left.new_empty(*left.shape[:-1], right.shape[-1])
    dtypes = {tensor.dtype for tensor in (left, right, add, out) if tensor is not None}
    fits = left.shape[-1] == right.shape[-2] and out.shape == (*left.shape[:-1], right.shape[-1])
    assert fits, f"{left.shape} x {right.shape} -> {out.shape}"
    assert len(dtypes) == 1, f"operands in {dtypes}"
    # Panels of a long sum leave the caches; torch's blocks do not.
    multiply_one = _compiled if _enabled and left.shape[-1] <= LONG else _widened
    if left.dim() == 2:
        multiply_one(left, right, add, factor, out)
        return out
    for index, (first, other, result) in enumerate(zip(left, right, out, strict=True)):
        multiply_one(first, other, None if add is None else add.expand(out.shape)[index], factor, result)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear of x (..., K), weight (N, K) and bias (N,), with gradients for all of them."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not processor.widens():
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return y.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]
        ctx.save_for_backward(x if needed[1] else None, weight if needed[0] else None)  # type: ignore[arg-type]
        return product(x, weight.T, add=bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needed = ctx.needs_input_grad  # type: ignore[attr-defined]
        dx = product(dy, weight) if needed[0] else None
        dw = product(dy.T, x) if needed[1] else None
        return dx, dw, dy.sum(0) if needed[2] else None


def _compiled(left: Tensor, right: Tensor, add: Tensor | None, factor: float, out: Tensor) -> None:
    """Write the product to out (M, N) by products.cpp."""
    if not _in_rows(left) and left.numel() <= right.numel():
        left = left.contiguous()
    if not _in_rows(left):  # It is a transpose, as in a weight's gradient: so is the result then.
        turned = left.new_empty(right.shape[1], left.shape[0])
        _compiled(
            right.T.contiguous(), left.T.contiguous(), None if add is None else add.expand(out.shape).T, factor, turned
        )
        out.copy_(turned.T)
        return
    transposed = _in_rows(right)
    weight = right if transposed else right.T
    if not _in_rows(weight) or weight.shape[1] % 2:
        weight = F.pad(weight, (0, weight.shape[1] % 2))
    bias = added = None
    if add is not None and add.dim() == 1:
        bias = add.contiguous()
    elif add is not None:
        added = add if _in_rows(add) else add.contiguous()
    result = out if _in_rows(out) else torch.empty(out.shape, dtype=out.dtype)
    term = Factor(left, weight).term()
    weighted_sum([term], result, transposed=transposed, bias=bias, added=added, factor=factor)
    if result is not out:
        out.copy_(result)


def _in_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1


class _Blocks(threading.local):
    memory: Tensor | None = None


_blocks = _Blocks()


def widened_blocks() -> Tensor | None:
    """Return this thread's memory for widened blocks; None if none is reserved or this path widens nothing."""
    return _blocks.memory if processor.widens() else None


def _widened(left: Tensor, right: Tensor, add: Tensor | None, factor: float, out: Tensor) -> None:
    """Write the product to out (M, N) by torch's fp32 products of blocks."""
    reserve()
    assert _blocks.memory is not None
    wide_left, wide_right, totals = _blocks.memory.split(BLOCK * BLOCK)
    (rows, summed), columns = left.shape, right.shape[1]
    added = None if add is None else add.expand(out.shape)
    for m in _slices(rows):
        for n in _slices(columns):
            place = out[m, n]
            total = totals[: place.numel()].view(place.shape) if added is None else _filled(totals, added[m, n])
            beta = 0.0 if added is None else 1.0
            for k in _slices(summed):
                first, other = _filled(wide_left, left[m, k]), _filled(wide_right, right[k, n])
                torch.addmm(total, first, other, beta=beta, alpha=factor, out=total)
                beta = 1.0
            place.copy_(total) if summed or added is not None else place.zero_()


def _slices(size: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, size, BLOCK))


def _filled(memory: Tensor, values: Tensor) -> Tensor:
    """Return values (M, N) in fp32 in this memory, in their own order of dimensions."""
    turned = values.stride(0) == 1 and values.stride(1) != 1
    ordered = values.T if turned else values
    copied = memory[: values.numel()].view(ordered.shape).copy_(ordered)
    return copied.T if turned else copied
