"""A random subspace of all parameters, P with orthonormal columns, which is applied and never made or stored.

Letters: D parameters, d dimensions of the subspace, L = 2^k >= d rows of a block, N = ceil(D / L) blocks.

Block b of P is the first d columns of sqrt(L/D) Q_b, cut off at D in the last one, with the orthogonal
Q_b = H S3_b H S2_b H S1_b / L^(3/2): H is the Walsh-Hadamard matrix and S are diagonals of random signs (arXiv
1703.00864). Fastfood (H G Pi H B, arXiv 1408.3060), which SAID takes, has a Gaussian and a permutation where this has
signs, and columns that are not orthogonal: README.md has both measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.system.randomness import key_of
from distlora_kernels.philox import MASK, philox

SIGNS_PER_COUNTER = 128
"""Four words of 32 bits. No block is shorter, so that each begins with a counter of its own."""
FACTOR_BITS = 6
"""H is applied as Kronecker factors of at most 64 x 64, which are matrix products."""
ELEMENTS_AT_ONCE = 2**20
"""Of P's rows: what is in memory beside the vectors themselves, a few times over."""
STAGES = 3


class Projection:
    """P of (D, d), of a seed; `parameters_of` and `coordinates_of` apply it and its adjoint, in fp32."""

    def __init__(self, seed: int, *, size: int, dimension: int, device: torch.device) -> None:
        assert 0 < dimension <= size, f"{dimension} dimensions of {size}"
        self.size, self.dimension, self.device = size, dimension, device
        self.bits = max(dimension - 1, SIGNS_PER_COUNTER - 1).bit_length()
        self.block = 2**self.bits
        self._key = key_of(seed, "subspace")
        self._scale = (self.block / size) ** 0.5 * self.block ** (-STAGES / 2)

    def parameters_of(self, coordinates: Tensor, out: Tensor) -> Tensor:
        """coordinates (d,) -> P coordinates, into out (D,)."""
        padded = F.pad(coordinates * self._scale, (0, self.block - self.dimension))
        for first, rows in self._chunks():
            x = padded.expand(rows, self.block)
            for stage in range(STAGES):
                x = hadamard(x * self._signs(stage, first, rows))
            part = out[first : first + rows * self.block]
            part.copy_(x.view(-1)[: len(part)])
        return out

    def coordinates_of(self, parameters: Tensor) -> Tensor:
        """parameters (D,) -> P^T parameters (d,): the adjoint, H and S being symmetric."""
        total = torch.zeros(self.block, device=self.device)
        for first, rows in self._chunks():
            part = parameters[first : first + rows * self.block]
            x = F.pad(part, (0, rows * self.block - len(part))).view(rows, self.block)
            for stage in reversed(range(STAGES)):
                x = hadamard(x) * self._signs(stage, first, rows)
            total += x.sum(dim=0)
        return total[: self.dimension] * self._scale

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """(first row of P, blocks) that are computed together."""
        at_once = max(1, ELEMENTS_AT_ONCE // self.block)
        blocks = -(-self.size // self.block)
        for first in range(0, blocks, at_once):
            yield first * self.block, min(at_once, blocks - first)

    def _signs(self, stage: int, first: int, rows: int) -> Tensor:
        """(rows, L) of +1 and -1: bits of Philox by the row of P, so that they depend on nothing else."""
        count = rows * self.block // SIGNS_PER_COUNTER
        index = torch.arange(count, device=self.device) + first // SIGNS_PER_COUNTER
        zero = torch.zeros_like(index)
        words = torch.stack(philox(self._key, (index & MASK, index >> 32, zero + stage, zero)), dim=1)
        octets = words.to(torch.int32).view(torch.uint8)  # The words' own bits: they are below 2^32.
        return F.embedding(octets.int(), _signs_of_octets(self.device)).view(rows, self.block)


def hadamard(x: Tensor) -> Tensor:
    """H x along the last of two dims, of 2^k elements, unnormalized: H H = 2^k."""
    rows, length = x.shape
    bits = length.bit_length() - 1
    parts = -(-bits // FACTOR_BITS)
    after = length
    for part in range(parts):
        factor = 2 ** (bits * (part + 1) // parts - bits * part // parts)
        after //= factor
        matrix = _hadamard_matrix(factor, x.device)
        x = x.reshape(-1, factor) @ matrix if after == 1 else matrix @ x.reshape(-1, factor, after)
    return x.reshape(rows, length)


@functools.cache
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


@functools.cache
def _signs_of_octets(device: torch.device) -> Tensor:
    """(256, 8): -1 where the bit is set."""
    octets = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return 1.0 - 2.0 * (octets & 1)
