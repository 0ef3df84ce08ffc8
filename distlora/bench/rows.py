"""Rows that a benchmark trains on without a run folder."""

from __future__ import annotations

import numpy as np
import torch

from distlora.data.loader import PackedRows
from distlora.data.rows import STARTS, TRAINED


def random_rows(count: int, length: int, vocabulary: int) -> PackedRows:
    """Rows of one document each, with every token trained but the first."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, length), dtype=np.int32)
    flags = np.full((count, length), TRAINED, np.uint8)
    flags[:, 0] |= STARTS
    flags[:, -1] &= ~np.uint8(TRAINED)
    return packed(tokens, flags)


def packed(tokens: np.ndarray, flags: np.ndarray) -> PackedRows:
    """Tokens and flags (rows, length) as a run has them, but for the documents that they are of."""
    targets = np.count_nonzero(flags & TRAINED, axis=1).astype(np.int32)
    return PackedRows(tokens, flags, targets, np.zeros(len(tokens), np.int32), 0, {})


def random_tokens(rows: int, length: int, vocabulary: int, rank: int) -> torch.Tensor:
    """Return (rows, length) int64 tokens, different on each rank."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(rank))
