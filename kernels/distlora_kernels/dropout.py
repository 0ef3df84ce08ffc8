"""Which inputs of an adapter are dropped: a pure function of what is dropped, never of who asks, when or in what batch.

So a mask need not be kept: backward and recomputation ask again, and any split of the rows gives the same.

The definition, for a linear's input x[position, column] of row `row` in training step `step`:

    words = Philox-4x32-10(key, counter = (column // 8, position, row, step))      32-bit each, modulo 2^32
    h     = half number column % 8 of the words, low halves first, as a signed 16-bit integer
    x is dropped where h < threshold - 2^15

Each of the 65,536 values of h is equally likely, so the probability is threshold / 2^16 exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels.philox import MASK, philox

COLUMNS_PER_CALL = 8
_HALF = 2**16

_CPU_COUNTERS, _GPU_COUNTERS = 2**15, 2**22
"""Counters at once: on a CPU the words stay in its cache (2.2 ns an element against 4.1), on a GPU they fill it."""


class Dropout(NamedTuple):
    """The dropout of one linear in one pass over some rows."""

    key: tuple[int, int]
    """The linear's, and the run's seed's: two 32-bit words."""
    threshold: int
    """Probability in units of 2^-16."""
    step: int
    """The optimizer step that the rows are in: the same rows are dropped differently in another."""
    rows: Tensor
    """(B,) int64: the number of each row in the training data, whatever the batch it is run in."""
    first: int = 0
    """The position of the first input of each row: not 0 where a part of the rows is run."""

    @property
    def scale(self) -> float:
        """What makes up for the elements that are missing: 1 / (share that is kept), exact for the threshold."""
        return _HALF / (_HALF - self.threshold)


def threshold_of(probability: float) -> int:
    """A probability from 0 to below 1 in units of 2^-16: the nearest; above 0 never 0, below 1 never 1."""
    assert 0 <= probability < 1, probability
    return min(max(round(probability * _HALF), 1 if probability > 0 else 0), _HALF - 1)


@torch.no_grad()
def dropped(dropout: Dropout, num_rows: int, columns: int) -> Tensor:
    """(M, I) bool: true where the input is dropped. M = B x tokens, the rows of the batch one after the other."""
    device, batch = dropout.rows.device, dropout.rows.shape[0]
    assert num_rows % batch == 0, f"{num_rows} inputs are not {batch} rows of equal length"
    row = (dropout.rows & MASK).repeat_interleave(num_rows // batch)[:, None]
    position = torch.arange(num_rows // batch, device=device).add_(dropout.first).repeat(batch)[:, None]
    calls = -(-columns // COLUMNS_PER_CALL)
    column = torch.arange(calls, device=device)
    words = torch.empty(num_rows, calls, 4, dtype=torch.int32, device=device)
    size = max(1, (_CPU_COUNTERS if device.type == "cpu" else _GPU_COUNTERS) // calls)
    for start in range(0, num_rows, size):
        part = slice(start, start + size)
        counter = (column, position[part], row[part], dropout.step & MASK)
        for index, word in enumerate(philox(dropout.key, counter)):
            words[part, :, index] = word  # To int32: the same 32 bits.
    halves = words.view(num_rows, calls * 4).view(torch.int16)  # Little-endian: the low half comes first.
    return halves[:, :columns] < dropout.threshold - _HALF // 2
