"""Causal attention by documents on the CPU, by attention.cpp: for processors with AVX512-BF16.

What is kept for backward is query, key, value and a number a query and head; the weights are made again. Scores are
fp32, weights and the gradients of scores are rounded to bf16 for the products that they are in, whose sums are fp32.
What is not finite reaches all of its document, what comes before it too, as 0 times it, and no other.

Letters: T tokens of all documents, H heads of queries, K of keys and values, E head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import native
from distlora_kernels.elementwise import call

COLUMNS = 16
"""Heads have a multiple of so many."""


def why_not(key_heads: int, size: int) -> str | None:
    """Why heads of this size are not attended here; None where they are."""
    if not native.library().attends():
        return "this processor has no AVX512-BF16"
    if size % COLUMNS:
        return f"heads of {size} columns are no multiple of {COLUMNS}"
    if key_heads < (threads := torch.get_num_threads()):
        return f"{key_heads} heads of keys are fewer than {threads} threads"
    return None


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int | None
) -> Tensor:
    """query (T, H, E), key and value (T, K, E), bf16; cu_seqlens (documents + 1,) from 0 to T -> (T, H, E) bf16,
    contiguous. A token sees itself and `left` tokens before it, all for None. Raises MemoryError where there is none
    for a document's scores."""
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
    """`scale` is that of powers of 2."""

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
    """The tensor with its heads' columns side by side, whose strides can be counted in pairs."""
    pairs = all(tensor.stride(dim) % 2 == 0 for dim in (0, 1))
    return tensor if tensor.stride(2) == 1 and pairs else tensor.contiguous()
