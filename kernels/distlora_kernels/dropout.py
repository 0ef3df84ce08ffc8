"""Which inputs of an adapter are dropped: a pure function of what is dropped, never of who asks, when or in what batch.

So a mask need not be kept: backward and recomputation ask again, and any split of the rows gives the same.

The definition, for a linear's input x[position, column] of row `row` in training step `step`:

    words = Philox-4x32-10(key, counter = (column // 8, position, row, step))      32-bit each, modulo 2^32
    h     = half number column % 8 of the words, low halves first, as a signed 16-bit integer
    x is dropped where h < threshold - 2^15

Each of the 65,536 values of h is equally likely, so the probability is threshold / 2^16 exactly.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distlora_kernels.philox import MASK, philox
from distlora_kernels.tables import on_device

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


class Stream(NamedTuple):
    """What the mask of an adapter depends on beside its rows' places."""

    key: tuple[int, int]
    threshold: int

    @property
    def scale(self) -> float:
        return _HALF / (_HALF - self.threshold)


class ChosenDropout(NamedTuple):
    """The dropout of one linear in one pass over rows that choose among adapters: each row's is that of its adapter, as
    if that were alone.
    """

    streams: tuple[Stream, ...]
    """Of each adapter; a threshold of 0 drops nothing."""
    chosen: Tensor
    """(B,) int64: the adapter's number, -1 for none."""
    steps: Tensor
    """(B,) int64: the optimizer step that each row is in."""
    rows: Tensor
    first: int = 0

    @property
    def scales(self) -> tuple[float, ...]:
        """What makes up for the elements that are missing, of each adapter."""
        return tuple(stream.scale for stream in self.streams)

    def of(self, adapter: int, part: slice) -> Dropout | None:
        """What drops inputs of the rows `part` of the batch, which all use `adapter` in one step; reads the host."""
        key, threshold = self.streams[adapter]
        if threshold == 0:
            return None
        return Dropout(key, threshold, int(self.steps[part.start]), self.rows[part], self.first)


@functools.lru_cache(maxsize=1024)
def stream_table(streams: tuple[Stream, ...], device: torch.device) -> Tensor:
    """(N + 1, 3) int64: key and threshold of each adapter, and in the end of none, which drops nothing."""
    return torch.tensor([(*key, threshold) for key, threshold in (*streams, ((0, 0), 0))], device=device)


def threshold_of(probability: float) -> int:
    """A probability from 0 to below 1 in units of 2^-16: the nearest; above 0 never 0, below 1 never 1."""
    assert 0 <= probability < 1, probability
    return min(max(round(probability * _HALF), 1 if probability > 0 else 0), _HALF - 1)


@torch.no_grad()
def dropped(dropout: Dropout | ChosenDropout, num_rows: int, columns: int) -> Tensor:
    """(M, I) bool: true where the input is dropped. M = B x tokens, the rows of the batch one after the other."""
    device, batch = dropout.rows.device, dropout.rows.shape[0]
    assert num_rows % batch == 0, f"{num_rows} inputs are not {batch} rows of equal length"

    def of_inputs(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(num_rows // batch)[:, None]

    key: tuple[Any, Any]
    step: int | Tensor
    bound: int | Tensor
    if isinstance(dropout, Dropout):
        key, step, bound = dropout.key, dropout.step & MASK, dropout.threshold - _HALF // 2
    else:
        words = stream_table(dropout.streams, device)[dropout.chosen]
        key, step = (of_inputs(words[:, 0]), of_inputs(words[:, 1])), of_inputs(dropout.steps & MASK)
        bound = of_inputs(words[:, 2] - _HALF // 2).short()
    row = of_inputs(dropout.rows & MASK)
    position = torch.arange(num_rows // batch, device=device).add_(dropout.first).repeat(batch)[:, None]
    calls = -(-columns // COLUMNS_PER_CALL)
    column = torch.arange(calls, device=device)
    words = torch.empty(num_rows, calls, 4, dtype=torch.int32, device=device)
    size = max(1, (_CPU_COUNTERS if device.type == "cpu" else _GPU_COUNTERS) // calls)
    for start in range(0, num_rows, size):
        part = slice(start, start + size)
        counter = (column, position[part], row[part], _part(step, part))
        for index, word in enumerate(philox((_part(key[0], part), _part(key[1], part)), counter)):
            words[part, :, index] = word  # To int32: the same 32 bits.
    halves = words.view(num_rows, calls * 4).view(torch.int16)  # Little-endian: the low half comes first.
    return halves[:, :columns] < bound


def _part(value: Any, part: slice) -> Any:
    """The inputs `part` of what is one number, or (M, 1)."""
    return value[part] if isinstance(value, Tensor) else value


def seen_of(x: Tensor, dropout: Dropout | ChosenDropout) -> Tensor:
    """d(x), (M, I), times what makes up for the elements that are missing."""
    x = x.masked_fill(dropped(dropout, *x.shape), 0)
    if isinstance(dropout, Dropout):
        return x.mul_(dropout.scale)
    of_adapters = on_device((*dropout.scales, 1.0), x.device)[dropout.chosen]  # In the end of none (-1).
    return x.unflatten(0, (of_adapters.shape[0], -1)).mul_(of_adapters[:, None, None]).flatten(0, 1)
