"""Products with a weight in fp64, which is never whole in it: a few of its rows at a time.

Letters: X is W or its transpose, whichever is tall: T rows, N columns; R columns of what it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 2**22
"""Of a weight, widened to fp64 at once: 32 MiB."""


def gram(tall_TN: Tensor) -> Tensor:
    """X^T X: (N, N) fp64."""
    columns = tall_TN.shape[1]
    gram_NN = torch.zeros(columns, columns, dtype=torch.float64, device=tall_TN.device)
    for part_cN in _parts(tall_TN):
        gram_NN.addmm_(part_cN.T, part_cN)
    return gram_NN


def times(tall_TN: Tensor, other_NR: Tensor) -> Tensor:
    """X other: (T, R) fp64."""
    product_TR = torch.empty(tall_TN.shape[0], other_NR.shape[1], dtype=torch.float64, device=tall_TN.device)
    first = 0
    for part_cN in _parts(tall_TN):
        torch.mm(part_cN, other_NR, out=product_TR[first : first + len(part_cN)])
        first += len(part_cN)
    return product_TR


def transposed_times(tall_TN: Tensor, other_TR: Tensor) -> Tensor:
    """X^T other: (N, R) fp64."""
    product_NR = torch.zeros(tall_TN.shape[1], other_TR.shape[1], dtype=torch.float64, device=tall_TN.device)
    first = 0
    for part_cN in _parts(tall_TN):
        product_NR.addmm_(part_cN.T, other_TR[first : first + len(part_cN)])
        first += len(part_cN)
    return product_NR


def _parts(tall_TN: Tensor) -> Iterator[Tensor]:
    rows = max(1, ELEMENTS // tall_TN.shape[1])
    for part_cN in tall_TN.split(rows):
        yield part_cN.double()
