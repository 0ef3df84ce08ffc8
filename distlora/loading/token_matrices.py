"""Embedding and LM head with new tokens: stored rows from disk, new rows by a rule, initial values of trained rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distlora.architecture.safetensors_headers import Segment
from distlora.architecture.tokens import Vocabulary
from distlora.config import UserError
from distlora.loading.quantize import copy_into
from distlora.model.adapters import TokenRows
from distlora.parallel import Backend, whole_shape
from distlora.weights.reader import Reader

ROWS_PER_SUM = 256
"""Rows added up at once by one rank, so that a mean does not depend on the shards.

In fp64 they and all sums of a 128k vocabulary with 8,192 columns take 16 and 34 MB.
"""


@torch.no_grad()
def load_matrix(
    parameter: nn.Parameter,
    segments: Sequence[Segment],
    reader: Reader,
    backend: Backend,
    name: str,
    *,
    vocabulary: Vocabulary,
    token_rows: TokenRows | None,
) -> None:
    """Fill the rank's rows of an embedding or LM head, and initialize its trained rows, which all ranks have.

    Every rank must call it for every matrix in the same order. Raises UserError for NaN or Inf.
    """
    copy_into(parameter, segments, reader, backend, name, padding=0 if vocabulary.has_grown else None)
    width = whole_shape(parameter)[1]
    new_row = None
    if vocabulary.new:
        new_row = mean_row(segments, min(vocabulary.new.values()), width, reader, backend).to(parameter.dtype)
        local, first = backend.local_rows(parameter)
        for id in vocabulary.new.values():
            if first <= id < first + len(local):
                local[id - first] = new_row
    if token_rows is not None:
        new_ids = set(vocabulary.new.values())
        for row, id in zip(token_rows.rows, token_rows.ids, strict=True):
            # Rounded to the matrix's dtype, so that the untrained model is unchanged.
            stored = None if id in new_ids else reader.read(segments, id * width, (id + 1) * width)
            start = new_row if stored is None else stored.to(parameter.dtype)
            assert start is not None
            if not bool(torch.isfinite(start).all()):  # Another rank's shard may hold the row.
                raise UserError(f"{name} holds NaN or Inf weights; the checkpoint is damaged, download it again")
            row.copy_(start)


def mean_row(segments: Sequence[Segment], num_rows: int, width: int, reader: Reader, backend: Backend) -> Tensor:
    """Return the mean of the matrix's first `num_rows` rows, (width,) fp64; the ranks divide the rows among them."""
    world, rank, device = backend.ranks.world, backend.ranks.rank, backend.ranks.device
    starts = range(0, num_rows, ROWS_PER_SUM)
    sums = torch.zeros(len(starts), width, dtype=torch.float64, device=device)
    for index in range(rank, len(starts), world):
        sums[index] = _sum_of(segments, starts[index], num_rows, width, reader).to(device)
    backend.sum_over_ranks(sums)  # All but one rank's are zeros, so nothing is rounded.
    return _in_order(sums) / num_rows


def mean_row_alone(segments: Sequence[Segment], num_rows: int, width: int, reader: Reader) -> Tensor:
    """Return `mean_row` for one process without a model; the same bits on the CPU."""
    sums = [_sum_of(segments, start, num_rows, width, reader) for start in range(0, num_rows, ROWS_PER_SUM)]
    return _in_order(torch.stack(sums)) / num_rows


def _sum_of(segments: Sequence[Segment], start: int, num_rows: int, width: int, reader: Reader) -> Tensor:
    """Return the sum of ROWS_PER_SUM rows from `start` on, at most up to `num_rows`: (width,) fp64."""
    stop = min(start + ROWS_PER_SUM, num_rows)
    return reader.read(segments, start * width, stop * width).view(-1, width).double().sum(dim=0)


def _in_order(sums: Tensor) -> Tensor:
    """Sum (n, width) -> (width,) one row after another."""
    total = torch.zeros_like(sums[0])
    for part in sums:
        total += part
    return total
