"""Counter-based random words: Philox-4x32-10 (Salmon et al., SC 2011) in integer tensor ops.

A word depends on its key and its counter alone: it can be asked for in any order, on any device, again.
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
    """Four 32-bit random words for each 32-bit counter word quadruple; int64 tensors hold the words, as they are in C.

    The counter's words broadcast against each other, and the first rounds are computed before they do; a key of tensors
    must not be wider than word 3 of the counter is.
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
        # Their low words. What is above them meets only an xor and the mask after it, in the next round.
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK
