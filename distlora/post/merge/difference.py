"""Weights as what they differ from a prediction by, in few bytes, exactly.

A float's bits, read as an integer with the sign turned into an order, rise with its value; so what lies close differs
by a small integer, which becomes 0, 1, 2, ... for 0, -1, 1, ... Its bytes go apart, all lowest ones first, each lot
deflated where that helps: of a good prediction all but the lowest are zeros.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_LEVEL = 1
"""Of zlib: higher ones gain little here and take several times as long."""
_RAW, _DEFLATED = b"\0", b"\1"
_INTEGERS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}
"""By an element's bytes: its bits, and what they are computed with."""


def encode(values: Tensor, predicted: Tensor) -> list[bytes]:
    """Both (n,) of one float type -> a content for each of its bytes, the lowest first."""
    size = values.dtype.itemsize
    bits = 8 * size
    apart = _ordered(values) - _ordered(predicted)
    half = 1 << (bits - 1)
    apart = ((apart + half) & ((1 << bits) - 1)) - half
    folded = torch.where(apart < 0, -2 * apart - 1, 2 * apart)
    return [pack(((folded >> (8 * place)) & 255).to(torch.uint8)) for place in range(size)]


def decode(contents: Sequence[bytes], predicted: Tensor) -> Tensor:
    """`values` back, bit for bit."""
    size = predicted.dtype.itemsize
    own, wide = _INTEGERS[size]
    half = 1 << (8 * size - 1)
    folded = torch.zeros(len(predicted), dtype=wide)
    for place, content in enumerate(contents):
        folded |= unpack(content).to(wide) << (8 * place)
    value = _ordered(predicted) + ((folded >> 1) ^ -(folded & 1))
    value = ((value + half) & (2 * half - 1)) - half
    return torch.where(value < 0, -(value + 1) - half, value).to(own).view(predicted.dtype)


def pack(plane: Tensor) -> bytes:
    """(n,) uint8, deflated where that makes it smaller."""
    content = plane.numpy().tobytes()
    deflated = zlib.compress(content, _LEVEL)
    return _DEFLATED + deflated if len(deflated) < len(content) else _RAW + content


def unpack(content: bytes) -> Tensor:
    """(n,) uint8. Raises zlib.error for what is damaged."""
    plain = zlib.decompress(content[1:]) if content[:1] == _DEFLATED else content[1:]
    return torch.frombuffer(bytearray(plain), dtype=torch.uint8)


def _ordered(values: Tensor) -> Tensor:
    """Integers that rise with the values; -0 is below 0."""
    own, wide = _INTEGERS[values.dtype.itemsize]
    bits = values.contiguous().view(own).to(wide)
    half = 1 << (8 * values.dtype.itemsize - 1)
    return torch.where(bits < 0, -(bits + half) - 1, bits)
