"""dora.py in plain torch: the definition of "correct". The letters are dora.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels import reference

STRIPE_ELEMENTS = 2**20
"""Products that magnitude_gradient has in memory at once, 4 MiB. Each stripe ends in barriers of torch's threads: with
fewer elements they are dearer than the cache is worth (kernels/README.md)."""


def scaled_absmax(parts: list[Tensor], rows: int, columns: int, factor: Tensor) -> Tensor:
    """The absmax (G, 256) fp32 of a packed weight (rows, columns), each times the factor (rows,) of its row; padding of
    the last group is 0."""
    absmax = parts[1]
    if len(parts) == 4:
        _, scales, group_scale, offset = parts
        absmax = reference.dynamic_map().to(scales.device)[scales.int()] * group_scale[:, None] + offset
    scaled = torch.zeros_like(absmax)
    blocks = columns // reference.BLOCK
    scaled.view(-1)[: rows * blocks] = (absmax.view(-1)[: rows * blocks].view(rows, blocks) * factor[:, None]).flatten()
    return scaled


def dora_norms(row_norms_squared: Tensor, wa: Tensor, gram: Tensor, b: Tensor, scale: float) -> Tensor:
    """n (O,), wa (O, R), gram = A A^T (R, R), b (O, R) -> (O,) fp32: sqrt(n + 2 s <wa, b> + s^2 <b gram, b>) of each
    row.
    """
    wa, b = wa.float(), b.float()
    cross, square = (wa * b).sum(dim=1), ((b @ gram) * b).sum(dim=1)
    return root((row_norms_squared + 2 * scale * cross + scale**2 * square).clamp_min(0))


def root(squares: Tensor) -> Tensor:
    """The square root in fp32, correctly rounded: torch's own on the CPU misses the last bit of 15 % of the numbers."""
    return squares.double().sqrt().float()


def magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    """dy, y (M, O), magnitude (O,) -> (O,) fp32: sum over M of dy * y, divided by the magnitude; 0 where that is 0."""
    rows = max(1, STRIPE_ELEMENTS // max(dy.shape[1], 1))
    total = torch.zeros_like(magnitude)
    for left, right in zip(dy.split(rows), y.split(rows), strict=True):
        total += (left.float() * right.float()).sum(dim=0)
    return torch.where(magnitude == 0, 0.0, total / magnitude)
