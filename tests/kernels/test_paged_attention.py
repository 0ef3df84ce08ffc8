"""Attention to keys in blocks agrees with fp64 over gathered keys, for any lengths, windows and splits.

The kernels run on a GPU, or in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distlora_kernels import dispatch
from distlora_kernels.paged_attention import attend_blocks, attend_places, seen_places
from support.closeness import assert_close
from support.tiers import ci

BLOCK = 16
LENGTHS = (1, 17, 64, 300)
"""A single token; the second block; whole tiles; more than one part."""


@pytest.fixture
def device() -> Iterator[str]:
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with dispatch.interpreted():
            yield "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 16), ci(24, 1, 40), ci(3, 3, 80)])
@pytest.mark.parametrize("columns", [19, 20, ci(64)])
def test_blocks_are_attended_where_they_lie(
    dtype: torch.dtype, window: int | None, heads: int, key_heads: int, size: int, columns: int, device: str
) -> None:
    """Places outside of the blocks, and behind the lengths, hold NaN."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randperm(3 * columns * len(LENGTHS), generator=draw)[: columns * len(LENGTHS)]
    tables, lengths = blocks.view(len(LENGTHS), columns).to(device), torch.tensor(LENGTHS, device=device)
    places, seen = seen_places(tables, lengths, max(LENGTHS), BLOCK, window)
    keys, values = torch.full((2, 3 * columns * len(LENGTHS) * BLOCK, key_heads, size), torch.nan).to(device, dtype)
    used = places[seen[:, 0, 0]]
    for tokens in (keys, values):
        tokens[used] = torch.randn(len(used), key_heads, size, generator=draw).to(device, dtype)
    query = torch.randn(len(LENGTHS), 1, heads, size, generator=draw).to(device, dtype).transpose(1, 2).squeeze(2)
    found = attend_blocks(query, keys, values, tables, lengths, block=BLOCK, scale=0.3, window=window)
    whole = (tensor.double().nan_to_num() for tensor in (query, keys, values))
    expected = attend_places(*whole, places, seen, 0.3)
    assert found.dtype == dtype
    # Weights are rounded to bf16 for the product with values, which are up to 4 here.
    assert_close(found, expected, ulps=2.0 if dtype == torch.bfloat16 else 16.0)
