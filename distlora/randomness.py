"""Counter-based random numbers: a value depends on what it is for, never on who asks or when.

Philox-4x32-10 (Salmon et al., SC 2011) in integer tensor ops. The key names the run's seed and the tensor or module;
the counter is the position in it. So an adapter starts the same on any number of ranks, whatever else is initialized
before.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def key_of(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit key words for a stream: SHA-256 of the seed and the stream's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(key: tuple[int, int], counter: Tensor) -> Tensor:
    """Philox-4x32-10: counter (N, 4) int64 holding 32-bit words -> (N, 4) int64 holding 32-bit random words."""
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The int64 product wraps, and its bits are those of the unsigned 64-bit product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def uniform(shape: tuple[int, ...], *, seed: int, name: str) -> Tensor:
    """Uniform on the open interval (0, 1): fp64 of `shape`, element i of the flattened tensor from counter i // 4."""
    numel = math.prod(shape)
    counter = torch.zeros(-(-numel // 4), 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(counter.shape[0]) & _MASK
    counter[:, 1] = torch.arange(counter.shape[0]) >> 32
    words = philox(key_of(seed, name), counter).view(-1)[:numel]
    return ((words.double() + 0.5) / 2**32).view(shape)


def normal(shape: tuple[int, ...], *, seed: int, name: str) -> Tensor:
    """Standard normal: fp64 of `shape` (Box-Muller on pairs of uniforms)."""
    numel = math.prod(shape)
    pairs = uniform((-(-numel // 2), 2), seed=seed, name=name)
    radius, angle = (-2 * pairs[:, 0].log()).sqrt(), 2 * math.pi * pairs[:, 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).view(-1)[:numel].view(shape)
