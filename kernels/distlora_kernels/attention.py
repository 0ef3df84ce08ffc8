"""Compute causal attention of packed documents on CPUs with AVX2 or newer, by attention.cpp.

Backward keeps query, key, value and one fp32 number per query and head; the attention weights are recomputed. Scores
are fp32; weights and gradients of scores are rounded to bf16 for their products, whose sums are fp32. A value that is
not finite reaches the later tokens of its document, may reach earlier ones (as 0 times it), and no other document.

Letters: T tokens of all documents, H query heads, K key and value heads, E head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import native, processor
from distlora_kernels.elementwise import call

COLUMNS = 16
"""Head sizes must be a multiple of this."""


def unsupported_reason(key_heads: int, size: int) -> str | None:
    """Return why this node cannot attend with heads of this size; None if it can."""
    if not native.library().attends():
        return f"the path {processor.path()} has no compiled attention"
    if size % COLUMNS:
        return f"a head size of {size} is not a multiple of {COLUMNS}"
    if key_heads < (threads := torch.get_num_threads()):
        return f"{key_heads} key heads are fewer than {threads} threads"
    return None


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int | None
) -> Tensor:
    """Return the attention output, (T, H, E) bf16, contiguous.

    Args:
        query: (T, H, E) bf16.
        key: (T, K, E) bf16.
        value: (T, K, E) bf16.
        cu_seqlens: (documents + 1,), the documents' boundaries from 0 to T.
        longest: Tokens of the longest document.
        scale: Factor of the scores.
        left: Number of earlier tokens that a token attends to; None for all.

    Raises:
        MemoryError: There is no memory for a document's scores.
    """
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16, f"{query.dtype}, {key.dtype}, {value.dtype}"
    fits = key.shape == value.shape and query.shape[::2] == key.shape[::2] and query.shape[1] % key.shape[1] == 0
    assert fits, f"{query.shape}, {key.shape}, {value.shape}"
    assert query.shape[2] % COLUMNS == 0, f"heads of {query.shape[2]}"
    assert scale > 0, f"scores times {scale}"
    bounds = cu_seqlens.to(torch.int64).contiguous()
    ordered = bool(bounds[0] == 0) and bool(bounds[-1] == len(query)) and bool((bounds.diff() >= 0).all())
    assert ordered, f"documents from {bounds.tolist()} of {len(query)} tokens"
    output: Tensor = _Attend.apply(query, key, value, bounds, scale * math.log2(math.e), -1 if left is None else left)
    return output


class _Attend(torch.autograd.Function):
    """The autograd function; `scale` includes log2(e), as the softmax uses powers of 2."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, left: int) -> Tensor:
        query, key, value = map(_in_rows, (query, key, value))
        output = torch.empty(query.shape, dtype=query.dtype)
        logs = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32)
        _call("attention_forward", query, key, value, bounds, scale, left, output, logs)
        ctx.save_for_backward(query, key, value, bounds, logs)
        ctx.scale, ctx.left = scale, left
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bounds, logs = ctx.saved_tensors
        gradients = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
        assert d_output.dtype == query.dtype, f"gradients in {d_output.dtype}"
        d_output = d_output.contiguous()
        _call("attention_backward", query, key, value, bounds, ctx.scale, ctx.left, d_output, logs, *gradients)
        return *gradients, None, None, None


def _call(
    name: str, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, left: int, *others: Tensor
) -> None:
    tensors = (query, key, value)
    strides = [tensor.stride(dim) for tensor in tensors for dim in (0, 1)]
    sizes = (len(bounds) - 1, query.shape[1], key.shape[1], query.shape[2])
    if not call(name, query.dtype, *tensors, *strides, bounds, *sizes, scale, left, *others, len(query)):
        longest = int(bounds.diff().max())
        raise MemoryError(f"no memory for the scores of a document of {longest:,} tokens")


def _in_rows(tensor: Tensor) -> Tensor:
    """Return the tensor with contiguous columns and even strides."""
    pairs = all(tensor.stride(dim) % 2 == 0 for dim in (0, 1))
    return tensor if tensor.stride(2) == 1 and pairs else tensor.contiguous()
