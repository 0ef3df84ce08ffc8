"""Generate counter-based random words: Philox-4x32-10 (Salmon et al., SC 2011) in integer tensor operations.

A word depends only on its key and counter, so it can be computed in any order, on any device, repeatedly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(
    key: tuple[int | Tensor, int | Tensor], counter: tuple[Tensor, Tensor, Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit random words per counter of four 32-bit words, in int64 tensors.

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
