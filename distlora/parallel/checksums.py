"""Compute a checksum of tensors' bytes in integer ops: the same number on CPU and GPU, without a host sync.

The bytes are words of 32 bits (the last one padded with zeros), LINE words per line. The sum of a line, modulo 2^64,
weights each word by its position. The sums, as words, form lines again, until one is left: the checksum.

Within a line of 64 KiB every change of one word and every exchange of two bytes or two words is detected: weights are
odd, and those of two positions differ by an odd number times at most 2^14, so no such difference is a multiple of 2^64.
Any other change is missed once in about 2^60, because the weights' upper bits are random. Trailing zeros are not
counted: compare the lengths too.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels.philox import philox

LINE = 2**14
"""Words per line."""
_WORD_BYTES = 4
_LINE_BYTES = LINE * _WORD_BYTES
_LINES_AT_ONCE = {"cpu": 16, "cuda": 512}
"""Lines whose words are in memory as int64: 2 MiB on the CPU, which fits a core's cache, and 64 MiB on a GPU."""
_KEY = (0x64697374, 0x6C6F7261)


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Return (LINE,) int64 weights: 2 c + 1 and, from bit 33 on, 30 random bits."""
    places = torch.arange(LINE, dtype=torch.int64, device=device)
    zero = torch.zeros_like(places)
    random, *_ = philox(_KEY, (places, zero, zero, zero))
    return 2 * places + 1 + ((random & (2**30 - 1)) << 33)


@torch.no_grad()
def checksums(parts: Tensor) -> Tensor:
    """Return (P,) int64 checksums of `parts` (P, n) of any dtype, each part contiguous. Stays on the device."""
    assert parts.dim() == 2
    while True:
        sums = _line_sums(parts.view(torch.uint8))
        if sums.shape[1] <= 1:
            return sums.sum(dim=1)
        parts = sums


def _line_sums(parts: Tensor) -> Tensor:
    """Return (P, lines) int64 from (P, n) uint8."""
    weights = _weights(parts.device)
    num_parts, num_bytes = parts.shape
    lines = max(_LINES_AT_ONCE[parts.device.type] // max(num_parts, 1), 1)
    whole = num_bytes - num_bytes % _LINE_BYTES
    sums = []
    # One buffer for all chunks: on a CPU fresh memory costs more than the sums.
    buffer = torch.empty(num_parts, min(lines, whole // _LINE_BYTES), LINE, dtype=torch.int64, device=parts.device)
    for start in range(0, whole, lines * _LINE_BYTES):
        words = _words(parts[:, start : min(start + lines * _LINE_BYTES, whole)]).unflatten(1, (-1, LINE))
        sums.append(buffer[:, : words.shape[1]].copy_(words).mul_(weights).sum(dim=2))
    if whole < num_bytes:
        sums.append(_short_line_sums(_words(parts[:, whole:]), weights)[:, None])
    return torch.cat([weights.new_empty(num_parts, 0), *sums], dim=1)


def _short_line_sums(words: Tensor, weights: Tensor) -> Tensor:
    """Return (P,) int64 from (P, n) int32 with n < LINE."""
    num_parts, length = words.shape
    at_once = min(_LINES_AT_ONCE[words.device.type] * LINE // length, max(num_parts, 1))
    buffer = torch.empty(at_once, length, dtype=torch.int64, device=words.device)
    sums = weights.new_empty(num_parts)
    for start in range(0, num_parts, at_once):
        some = words[start : start + at_once]
        torch.sum(buffer[: len(some)].copy_(some).mul_(weights[:length]), dim=1, out=sums[start : start + at_once])
    return sums


def _words(parts: Tensor) -> Tensor:
    """View (P, n) uint8 as (P, ceil(n / 4)) int32, without a copy if each part begins and ends at a word boundary."""
    missing = -parts.shape[1] % _WORD_BYTES
    if missing:
        parts = F.pad(parts, (0, missing))
    elif parts.storage_offset() % _WORD_BYTES or parts.stride(0) % _WORD_BYTES:
        parts = parts.clone(memory_format=torch.contiguous_format)
    return parts.view(torch.int32)
