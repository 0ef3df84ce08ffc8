"""Attend with one query per row to keys and values that lie in blocks (PagedAttention, arXiv:2309.06180).

On a GPU paged_attention_triton.py reads the blocks where they are. `attend_places` is the reference, and what a CPU
runs: it gathers them.

Letters: N rows, H query heads, K key and value heads, E head size, S tokens per block, P places of the cache (all
blocks' tokens), B blocks of a row, L tokens that the longest row sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels.dispatch import on_device_of


def seen_places(tables: Tensor, lengths: Tensor, longest: int, block: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Return places (N, L) int64 of the keys of each row, and (N, 1, 1, L) bool, which of them its query sees.

    tables (N, B) int64: blocks of S = `block` tokens. lengths (N,) int64, at most `longest`: a query is the last of so
    many tokens, and sees the last `window` of them, all for None.
    """
    at = torch.arange(longest, device=tables.device)
    seen = at < lengths[:, None]
    if window is not None:
        seen &= at >= lengths[:, None] - window
    return tables[:, at // block] * block + at % block, seen[:, None, None, :]


def attend_places(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, seen: Tensor, scale: float | None
) -> Tensor:
    """Attend: query (N, H, E) to keys and values (P, K, E) at the places of `seen_places` -> (N, H, E)."""
    key, value = (tokens[places].transpose(1, 2) for tokens in (keys, values))
    # Query heads that share a key head are the queries of one head.
    grouped = query.unflatten(1, (key.shape[1], -1))
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen, scale=scale).flatten(1, 2)


def attend_blocks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    block: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attend as `attend_places` at the `seen_places`, on a GPU and without gathering them.

    Launches depend on shapes alone, not on lengths.
    """
    from distlora_kernels import paged_attention_triton

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with on_device_of(query):
        return paged_attention_triton.attend(query, keys, values, tables, lengths, block, scale, window)
