"""Counter-based random numbers: a value depends on its purpose, not on who computes it or when.

The key of Philox-4x32-10 is made from the run's seed and the tensor or module name; the counter is the position in it.
So an adapter has the same initial values on any number of ranks.
"""

import hashlib
import math

import torch
from torch import Tensor

from distlora_kernels.dropout import MASK, philox


def key_of(seed: int, name: str) -> tuple[int, int]:
    """Return the two 32-bit key words of a stream: SHA-256 of the seed and the stream's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniform(shape: tuple[int, ...], *, seed: int, name: str) -> Tensor:
    """Return uniform numbers on (0, 1): fp64 of `shape`, element i of the flattened tensor from counter i // 4."""
    numel = math.prod(shape)
    index = torch.arange(-(-numel // 4))
    zero = torch.zeros_like(index)
    words = torch.stack(philox(key_of(seed, name), (index & MASK, index >> 32, zero, zero)), dim=1).view(-1)[:numel]
    return ((words.double() + 0.5) / 2**32).view(shape)


def normal(shape: tuple[int, ...], *, seed: int, name: str) -> Tensor:
    """Return standard normal numbers: fp64 of `shape` (Box-Muller on pairs of uniforms)."""
    numel = math.prod(shape)
    pairs = uniform((-(-numel // 2), 2), seed=seed, name=name)
    radius, angle = (-2 * pairs[:, 0].log()).sqrt(), 2 * math.pi * pairs[:, 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1).view(-1)[:numel].view(shape)
