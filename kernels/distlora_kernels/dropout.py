"""Generate counter-based random words (Philox), and from them dropout masks as a pure function of the position.

A word depends only on its key and counter, so it can be computed in any order, on any device, repeatedly: a mask is
never stored.

Backward and recomputation compute the mask again, and any split of the sequences gives the same mask. For a linear's
input x[position, column] of sequence `row` in training step `step`:

    words = Philox-4x32-10(key, counter = (column // 8, position, row, step))      32-bit each, modulo 2^32
    h     = half number column % 8 of the words, low halves first, as a signed 16-bit integer
    x is dropped if h < threshold - 2^15

Each of the 65,536 values of h is equally likely, so the probability is exactly threshold / 2^16.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distlora_kernels.buffers import COLUMNS_PER_CALL, COUNTERS
from distlora_kernels.dispatch import on_device

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_HALF = 2**16


def philox(
    key: tuple[int | Tensor, int | Tensor], counter: tuple[Tensor, Tensor, Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit random words per counter of four 32-bit words, in int64 tensors.

    Philox-4x32-10 (Salmon et al., SC 2011) in integer tensor operations.
    The counter's words broadcast against each other, after the first rounds. A key of tensors must not be wider than
    word 3 of the counter.
    """
    c0, c1, c2 = counter[:3]
    c3: Any = counter[3]
    k0: Any = key[0]
    k1: Any = key[1]
    for _ in range(_ROUNDS):
        # The int64 product wraps, and its bits are those of the unsigned 64-bit product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(MASK)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(MASK)
        # The low words; the high bits are masked in the next round.
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


class Dropout(NamedTuple):
    """The dropout of one linear in one pass over some sequences."""

    key: tuple[int, int]
    """Two 32-bit words, from the linear's name and the run's seed."""
    threshold: int
    """Probability in units of 2^-16."""
    step: int
    """Optimizer step of the sequences; another step has another mask."""
    rows: Tensor
    """(B,) int64: index of each sequence in the training data."""
    first: int = 0
    """Position of the first input of each sequence; not 0 if only a part of the sequences runs."""

    @property
    def scale(self) -> float:
        """1 / (probability of keeping an element), exact for the threshold."""
        return _HALF / (_HALF - self.threshold)


class Stream(NamedTuple):
    """Key and threshold of one adapter's mask."""

    key: tuple[int, int]
    threshold: int

    @property
    def scale(self) -> float:
        """1 / (probability of keeping an element)."""
        return _HALF / (_HALF - self.threshold)


class ChosenDropout(NamedTuple):
    """The dropout of one linear if rows choose among adapters: each row has its adapter's mask."""

    streams: tuple[Stream, ...]
    """Key and threshold of each adapter; a threshold of 0 drops nothing."""
    chosen: Tensor
    """(B,) int64: adapter of each row, -1 for none."""
    steps: Tensor
    """(B,) int64: optimizer step of each row."""
    rows: Tensor
    first: int = 0

    @property
    def scales(self) -> tuple[float, ...]:
        """1 / (probability of keeping an element) of each adapter."""
        return tuple(stream.scale for stream in self.streams)

    def of(self, adapter: int, span: slice) -> Dropout | None:
        """Return the dropout of the rows `span`, which all use `adapter` in one step; synchronizes with the GPU."""
        key, threshold = self.streams[adapter]
        if threshold == 0:
            return None
        return Dropout(key, threshold, int(self.steps[span.start]), self.rows[span], self.first)


@functools.lru_cache(maxsize=1024)
def stream_table(streams: tuple[Stream, ...], device: torch.device) -> Tensor:
    """Return (N + 1, 3) int64: key and threshold of each adapter; the last row, for no adapter, drops nothing."""
    return torch.tensor([(*key, threshold) for key, threshold in (*streams, ((0, 0), 0))], device=device)


def threshold_of(probability: float) -> int:
    """Return a probability in [0, 1) in units of 2^-16, rounded to nearest, but never to 0 or 1 from inside."""
    assert 0 <= probability < 1, probability
    return min(max(round(probability * _HALF), 1 if probability > 0 else 0), _HALF - 1)


@torch.no_grad()
def dropped(dropout: Dropout | ChosenDropout, num_rows: int, columns: int) -> Tensor:
    """Return (M, I) bool, true where the input is dropped; M = B x tokens, sequence by sequence."""
    device, batch = dropout.rows.device, dropout.rows.shape[0]
    assert num_rows % batch == 0, f"{num_rows} inputs are not {batch} sequences of equal length"

    def by_input(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(num_rows // batch)[:, None]

    key: tuple[Any, Any]
    step: int | Tensor
    bound: int | Tensor
    if isinstance(dropout, Dropout):
        key, step, bound = dropout.key, dropout.step & MASK, dropout.threshold - _HALF // 2
    else:
        words = stream_table(dropout.streams, device)[dropout.chosen]
        key, step = (by_input(words[:, 0]), by_input(words[:, 1])), by_input(dropout.steps & MASK)
        bound = by_input(words[:, 2] - _HALF // 2).short()
    return random_halves(key, step, dropout.rows, num_rows, columns, first=dropout.first) < bound


@torch.no_grad()
def random_halves(
    key: tuple[Any, Any], step: int | Tensor, rows: Tensor, num_rows: int, columns: int, *, first: int = 0
) -> Tensor:
    """Return (M, I) int16, each of the 65,536 values equally likely: the halves `h` of sequences `rows` (B,).

    The words of `key` and `step` are 32-bit numbers, or (M, 1) tensors of them. `first`: position of the first input.
    """
    device, batch = rows.device, rows.shape[0]
    row = (rows & MASK).repeat_interleave(num_rows // batch)[:, None]
    position = torch.arange(num_rows // batch, device=device).add_(first).repeat(batch)[:, None]
    calls = -(-columns // COLUMNS_PER_CALL)
    column = torch.arange(calls, device=device)
    words = torch.empty(num_rows, calls, 4, dtype=torch.int32, device=device)
    size = max(1, COUNTERS["cpu" if device.type == "cpu" else "cuda"] // calls)
    for start in range(0, num_rows, size):
        span = slice(start, start + size)
        counter = (column, position[span], row[span], _part(step, span))
        for index, word in enumerate(philox((_part(key[0], span), _part(key[1], span)), counter)):
            words[span, :, index] = word  # To int32: the same 32 bits.
    halves = words.view(num_rows, calls * 4).view(torch.int16)  # Little-endian: the low half comes first.
    return halves[:, :columns]


def _part(value: Any, span: slice) -> Any:
    """Return rows `span` of an (M, 1) tensor, or the number itself."""
    return value[span] if isinstance(value, Tensor) else value


def apply_dropout(x: Tensor, dropout: Dropout | ChosenDropout) -> Tensor:
    """Return d(x), (M, I), scaled by 1 / (probability of keeping an element)."""
    x = x.masked_fill(dropped(dropout, *x.shape), 0)
    if isinstance(dropout, Dropout):
        return x.mul_(dropout.scale)
    scales = on_device((*dropout.scales, 1.0), x.device)[dropout.chosen]  # The last is for no adapter (-1).
    return x.unflatten(0, (scales.shape[0], -1)).mul_(scales[:, None, None]).flatten(0, 1)
