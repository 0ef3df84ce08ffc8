"""Flash attention of packed documents, which torch has for CUDA alone, in plain torch on the host.

The arguments are checked as FlashAttention 2 checks them. In the mode "shapes" only results and the temporary tensors
that FlashAttention 2 allocates are made: our model of them, after its source.

Letters: T tokens of all documents, H query heads, K key and value heads, E head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pretend_cuda import device

MULTIPROCESSORS = device.PROPERTIES.multi_processor_count
Sizes = tuple[int, int]
_implementations = torch.library.Library("aten", "IMPL")
"""Kept: torch forgets them when their Library is deleted."""


def check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> None:
    """Assert what FlashAttention 2 requires of its arguments."""
    assert query.dtype in (torch.float16, torch.bfloat16), f"FlashAttention takes fp16 and bf16, not {query.dtype}"
    assert query.shape[-1] in range(8, 257, 8), f"head size {query.shape[-1]}"
    assert query.shape[-2] % key.shape[-2] == 0, f"{query.shape[-2]} query heads, {key.shape[-2]} key heads"
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1, "the last dimension must be contiguous"
    if cu_seqlens is not None:
        assert (cu_seqlens.device.type, cu_seqlens.dtype) == ("cuda", torch.int32), "cu_seqlens"
        assert cu_seqlens.is_contiguous(), "cu_seqlens"


def on_host(tensor: Tensor) -> Tensor:
    """Return (T, heads, E) in fp32, of documents or of a batch (B, T, heads, E)."""
    host: Tensor = torch.ops.pretend_cuda.host(tensor)
    return host.float().flatten(0, -3)


def documents(cu_seqlens: Tensor | None, tensor: Tensor) -> list[Sizes]:
    """Return (first, end) of each document, or of each row of a batch."""
    if cu_seqlens is None:
        batch, length = tensor.shape[:2]
        return [(row * length, (row + 1) * length) for row in range(batch)]
    return list(itertools.pairwise(torch.ops.pretend_cuda.host(cu_seqlens).tolist()))


def seen(queries: int, keys: int, is_causal: bool, left: int | None, right: int | None) -> Tensor:
    """Return (queries, keys) bool: which keys a query sees; the last query is beside the last key."""
    distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)[None]
    mask = distance >= 0 if is_causal else torch.ones(queries, keys, dtype=torch.bool)
    if left is not None and left >= 0:
        mask = mask & (distance <= left)
    if right is not None and right >= 0:
        mask = mask & (distance >= -right)
    return mask


def forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int,
    max_k: int, dropout: float, is_causal: bool, return_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
    seqused_k: Tensor | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (output, log-sum-exp (H, T) fp32, state, unused, mask): aten::_flash_attention_forward."""
    check(query, key, value, cu_q)
    heads = query.shape[-2]
    state, nothing = query.new_empty(2, dtype=torch.int64), query.new_empty(0)
    if device.MODE == "shapes":
        shape = (heads, query.shape[0]) if cu_q is not None else (query.shape[0], heads, query.shape[1])
        return torch.empty_like(query), query.new_empty(shape, dtype=torch.float32), state, nothing, nothing
    q, k, v = on_host(query), on_host(key), on_host(value)
    used = None if seqused_k is None else torch.ops.pretend_cuda.host(seqused_k).tolist()
    output, sums = torch.zeros(*q.shape[:2], v.shape[-1]), torch.full((heads, len(q)), float("inf"))
    for row, ((a, b), (c, d)) in enumerate(zip(documents(cu_q, query), documents(cu_k, key), strict=True)):
        end = d if used is None else c + used[row]
        assert b - a <= max_q, f"{b - a} queries, but max_q={max_q}"
        assert end - c <= max_k, f"{end - c} keys, but max_k={max_k}"
        if b == a or end == c:
            continue
        mask = seen(b - a, end - c, is_causal, window_size_left, window_size_right)
        scores = scores_of(q[a:b], k[c:end], scale, mask)
        sums[:, a:b] = scores.logsumexp(-1)
        weights = scores.softmax(-1).masked_fill(~mask, 0.0)  # Also where a query sees no key.
        values = v[c:end].repeat_interleave(heads // v.shape[1], 1)
        output[a:b] = torch.einsum("hqk,khd->qhd", weights, values)
    if cu_q is None:
        sums = sums.unflatten(1, (query.shape[0], -1)).transpose(0, 1).contiguous()
    moved = output.view(*query.shape[:-1], -1).to(query.dtype).to(query.device)
    return moved, sums.to(query.device), state.zero_(), nothing, nothing


def scores_of(query: Tensor, key: Tensor, scale: float | None, mask: Tensor) -> Tensor:
    """Return masked scores (H, queries, keys) of one document."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, float("-inf"))


def temporary(query: Tensor, key: Tensor, cu_q: Tensor | None) -> Iterator[Tensor]:
    """Yield the temporary tensors of FlashAttention 2's backward: fp32 sums of dQ, and dK and dV per query head."""
    heads, size = query.shape[-2], -(-query.shape[-1] // 32) * 32
    rows = query.shape[0] if cu_q is None else len(cu_q) - 1
    tokens = query.shape[:-2].numel()
    padded = tokens + 128 * rows
    # The deterministic backward sums dQ in as many parts as programs of a document share its keys.
    parts = -(-MULTIPROCESSORS // (rows * heads)) if torch.are_deterministic_algorithms_enabled() else 1
    yield query.new_empty(heads, padded, dtype=torch.float32)
    yield query.new_empty(parts, padded, heads, size, dtype=torch.float32)
    if key.shape[-2] != heads:
        yield query.new_empty(tokens, heads, query.shape[-1])
        yield query.new_empty(tokens, heads, query.shape[-1])


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, cu_q: Tensor | None,
    cu_k: Tensor | None, max_q: int, max_k: int, dropout: float, is_causal: bool, state: Tensor, unused: Tensor, *,
    scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of query, key and value: aten::_flash_attention_backward."""
    inputs = (query, key, value)
    if device.MODE == "shapes":
        found = tuple(torch.empty_like(tensor) for tensor in inputs)
        list(temporary(query, key, cu_q))  # All at once, beside the results.
        return found
    q, k, v, g = (on_host(tensor) for tensor in (*inputs, grad))
    group, factor = q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, k, v))
    for (a, b), (c, d) in zip(documents(cu_q, query), documents(cu_k, key), strict=True):
        if b == a or d == c:
            continue
        mask = seen(b - a, d - c, is_causal, window_size_left, window_size_right)
        weights = scores_of(q[a:b], k[c:d], scale, mask).softmax(-1).masked_fill(~mask, 0.0)
        keys, values = (tensor[c:d].repeat_interleave(group, 1) for tensor in (k, v))
        dweights = torch.einsum("qhd,khd->hqk", g[a:b], values)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * factor
        dq[a:b] = torch.einsum("hqk,khd->qhd", dscores, keys)
        dk[c:d] = torch.einsum("hqk,qhd->khd", dscores, q[a:b]).unflatten(1, (-1, group)).sum(2)
        dv[c:d] = torch.einsum("hqk,qhd->khd", weights, g[a:b]).unflatten(1, (-1, group)).sum(2)
    pairs = zip((dq, dk, dv), inputs, strict=True)
    return tuple(each.view(given.shape).to(given.dtype).to(given.device) for each, given in pairs)


def install() -> None:
    """Register both operators."""
    for name, function in (("_flash_attention_forward", forward), ("_flash_attention_backward", backward)):
        _implementations.impl(name, functools.partial(_counted, name, function), "CUDA")


def _counted(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with device.one_operator(f"aten::{name}"):
        return function(*arguments, **options)
