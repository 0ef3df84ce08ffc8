"""Tables of the numbers that codes stand for, one copy per device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Numbers of 1 sign, 2 exponent and 1 mantissa bit (OCP Microscaling Formats 1.0, table 1)."""


@functools.cache
def e4m3(device: torch.device) -> Tensor:
    """Return (256,) fp32: every float8_e4m3fn; torch's own conversion takes 5 times as long."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@functools.cache
def half_e8m0(device: torch.device) -> Tensor:
    """Return (256,) fp32: 2^(code - 128), half of each ue8m0 number, as the last one is beyond fp32."""
    return torch.tensor([2.0 ** (code - 128) for code in range(256)], device=device)


@functools.cache
def _pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return (256,) complex64: the two numbers of every byte as one element, as torch looks up single elements."""
    pairs = [(levels[byte & 15], levels[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, device=device).view(torch.complex64).view(256)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return the entries of a table (256,) in the shape of `index` uint8; table[index] takes 10 times as long."""
    return torch.index_select(table, 0, index.reshape(-1).int()).view(index.shape)


def nibbles(codes: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the numbers of 4-bit codes, (n, bytes) uint8 -> (n, 2 bytes) fp32; the low nibble is the first."""
    return look_up(_pairs(levels, codes.device), codes).view(torch.float32)
