"""Run paged_attention.py's operation on a GPU: keys and values are read once, where they lie.

A program has a row, a key head with its query heads, and a part of the row's tokens; with few rows a row's tokens are
split, and a second kernel joins the parts in order. Splits depend on shapes alone, and so do launches. Letters as in
paged_attention.py; G = H / K query heads of a key head.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlora_kernels.buffers import PROGRAMS

KEYS = {2: 64, 4: 32}
"""Tokens that a program reads at once, by bytes of a number."""
LEAST_TOKENS = 256
"""Tokens of a row for which another part of it is worth a program."""
MOST_SPLITS = 32
NUM_WARPS, NUM_STAGES = 4, 2
_SHAPES = ["table_columns", "split_tokens", "window"]
"""Arguments that may be any number; they must not create another specialization."""


@triton.jit(do_not_specialize=_SHAPES)
def attend_kernel(
    query_ptr, keys_ptr, values_ptr, tables_ptr, lengths_ptr, out_ptr, parts_ptr, sums_ptr, scale,
    stride_row, stride_head, stride_key, size, table_columns, split_tokens, window,
    GROUP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Attend to the tokens of a part: out (N, H, E), or its unscaled sum (N, H, parts, SIZE) and maximum and total.

    Grid (N, K, parts). HEADS and SIZE are G and E, padded. `scale` is in units of powers of 2.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    first = 0
    if window is not None:
        first = tl.maximum(length - window, 0)
    begin = tl.maximum(split * split_tokens, first // KEYS * KEYS)
    end = tl.minimum((split + 1) * split_tokens, length)
    of_group = tl.arange(0, HEADS)
    column = tl.arange(0, SIZE)
    heads = head * GROUP + of_group
    held = (of_group < GROUP)[:, None] & (column < size)[None, :]
    q_at = row.to(tl.int64) * stride_row + heads[:, None] * stride_head + column[None, :]
    q = tl.load(query_ptr + q_at, mask=held, other=0.0)
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, SIZE), tl.float32)
    table = tables_ptr + row.to(tl.int64) * table_columns
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        seen = (at < end) & (at >= first)
        place = tl.load(table + at // BLOCK, mask=seen, other=0) * BLOCK + at % BLOCK
        offset = place[:, None] * stride_key + head * size + column[None, :]
        loaded = seen[:, None] & (column < size)[None, :]
        keys = tl.load(keys_ptr + offset, mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # Each tile has a key that is seen, so that the maximum is finite.
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(most - higher)
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(values_ptr + offset, mask=loaded, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * kept[:, None], input_precision="ieee")
        most = higher
    row_heads = row.to(tl.int64) * tl.num_programs(1) * GROUP + heads
    if parts_ptr is None:
        out_at = row_heads[:, None] * size + column[None, :]
        tl.store(out_ptr + out_at, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=held)
    else:
        part = row_heads * tl.num_programs(2) + split
        tl.store(parts_ptr + part[:, None] * SIZE + column[None, :], mixed, mask=held)
        tl.store(sums_ptr + 2 * part, most, mask=of_group < GROUP)
        tl.store(sums_ptr + 2 * part + 1, total, mask=of_group < GROUP)


@triton.jit(do_not_specialize=["splits"])
def join_kernel(parts_ptr, sums_ptr, out_ptr, size, splits, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Join the parts of a row and head, in order: out (N, H, E). Grid (N H,). SPLITS are the parts, padded."""
    row_head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, SIZE)
    at = row_head * splits + split
    most = tl.load(sums_ptr + 2 * at, mask=split < splits, other=float("-inf"))
    total = tl.load(sums_ptr + 2 * at + 1, mask=split < splits, other=0.0)
    # A row has a part that sees a key, so that the maximum is finite; an empty part weighs 0.
    weights = tl.exp2(most - tl.max(most, 0))
    loaded = (split < splits)[:, None] & (column < size)[None, :]
    parts = tl.load(parts_ptr + at[:, None] * SIZE + column[None, :], mask=loaded, other=0.0)
    mixed = tl.sum(parts * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out_ptr + row_head * size + column, mixed.to(out_ptr.dtype.element_ty), mask=column < size)


def splits_of(programs: int, tokens: int) -> int:
    """Return into how many parts a row's tokens are split; `programs`: N K, `tokens`: those that a table holds."""
    return max(1, min(-(-2 * PROGRAMS // programs), -(-tokens // LEAST_TOKENS), MOST_SPLITS))


def attend(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, block: int, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """Return (N, H, E): paged_attention.attend_blocks."""
    num_rows, heads, size = query.shape
    key_heads, columns, tokens = keys.shape[1], tables.shape[1], KEYS[query.element_size()]
    assert query.stride(-1) == 1, "columns of a head are neighbours"
    assert keys.is_contiguous(), "keys have gaps"
    assert values.is_contiguous(), "values have gaps"
    assert tables.is_contiguous(), "tables have gaps"
    splits, width = splits_of(num_rows * key_heads, columns * block), triton.next_power_of_2(size)
    split_tokens = -(-columns * block // (splits * tokens)) * tokens
    group = heads // key_heads
    out = query.new_empty(query.shape)
    parts = sums = None
    if splits > 1:
        parts = query.new_empty(num_rows, heads, splits, width, dtype=torch.float32)
        sums = query.new_empty(num_rows, heads, splits, 2, dtype=torch.float32)
    attend_kernel[num_rows, key_heads, splits](
        query, keys, values, tables, lengths, out, parts, sums, scale * math.log2(math.e),
        query.stride(0), query.stride(1), keys.stride(0), size, columns, split_tokens, window,
        GROUP=group, HEADS=max(16, triton.next_power_of_2(group)), KEYS=tokens, SIZE=width, BLOCK=block,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(num_rows * heads,)](
            parts, sums, out, size, splits, SPLITS=triton.next_power_of_2(splits), SIZE=width, num_warps=NUM_WARPS
        )
    return out
