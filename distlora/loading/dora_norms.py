"""Squared row norms of a frozen weight over all ranks, which DoRA's norms start from.

A weight is sharded in groups of 16,384 weights (dense ones in rows), and a row may lie on two ranks. To make every bit
independent of the number of ranks, each sum has one order. b = gcd(in_features, 16384) consecutive weights never cross
a border of a row or a group. Their squares are added in halves (the first half to the second, down to one); the sums of
all ranks are concatenated, and those of a row are added in halves again. All sums are fp64, one addition after another,
and are rounded to fp32 once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distlora.model.adapters import AdaptedLinear
from distlora.parallel import Backend
from distlora_kernels import nf4
from distlora_kernels.operands import FrozenWeight

CHUNK_GROUPS = 16
"""Groups whose squares are in memory at once: 2 MiB in fp64."""


@torch.no_grad()
def fill_row_norms(linear: AdaptedLinear, backend: Backend) -> None:
    """Fill `row_norms_squared` from the weight as the GEMMs see it: dequantized and rounded to the run's dtype.

    Every rank must call it for every such linear in the same order, after the weight is complete.
    """
    assert linear.row_norms_squared is not None
    rows, columns = linear.out_features, linear.in_features
    size = math.gcd(columns, nf4.GROUP)
    parts = [halved(part.double().square().view(-1, size)) for part in _own_parts(linear, backend)]
    sums = torch.cat([linear.row_norms_squared.new_empty(0, dtype=torch.float64), *parts])  # A rank may own nothing.
    if backend.sharded:
        unit = nf4.GROUP if linear.quantized else columns
        units = -(-(linear.num_groups if linear.quantized else rows) // backend.shards.count)
        padded = torch.zeros(units * unit // size, dtype=torch.float64, device=sums.device)
        padded[: len(sums)] = sums
        sums = backend.gather_rows(padded)[: rows * columns // size]
    linear.row_norms_squared.copy_(halved(sums.view(rows, -1)))


def halved(values: Tensor) -> Tensor:
    """Return the sum over m of (n, m), adding the first half to the second; zeros pad m to a power of 2."""
    length = values.shape[1]
    missing = (1 << (length - 1).bit_length()) - length
    if missing:
        values = torch.cat([values, values.new_zeros(values.shape[0], missing)], dim=1)
    while values.shape[1] > 1:
        first, second = values.chunk(2, dim=1)
        values = first + second
    return values[:, 0]


def _own_parts(linear: AdaptedLinear, backend: Backend) -> Iterator[Tensor]:
    """Yield the rank's weights as flat tensors in the dtype of the GEMMs, without the padding of the last group."""
    chunk, device = CHUNK_GROUPS * nf4.GROUP, backend.ranks.device  # Rows may lie in host memory.
    if not linear.quantized:
        yield from (part.to(device) for part in backend.local_rows(linear.weight)[0].flatten().split(chunk))
        return
    numel, dtype = linear.in_features * linear.out_features, linear.compute_dtype
    codes, first = backend.local_rows(linear.codes)
    parts = [codes]
    if linear.plain_absmax:
        parts.append(backend.local_rows(linear.absmax)[0])
    else:
        parts += [backend.local_rows(linear.scales)[0], backend.local_rows(linear.group_scale)[0]]
    for start in range(0, codes.shape[0], CHUNK_GROUPS):
        chunk_parts = [part[start : start + CHUNK_GROUPS].to(device) for part in parts]
        if not linear.plain_absmax:
            assert isinstance(linear.offset, Tensor)
            chunk_parts.append(linear.offset)
        groups = chunk_parts[0].shape[0]
        dense = FrozenWeight(tuple(chunk_parts), (groups, nf4.GROUP)).dense(dtype).flatten()
        yield dense[: numel - (first + start) * nf4.GROUP]
