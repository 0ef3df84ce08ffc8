"""Stack the micro-batches of trials that share a base, so that one forward runs rows of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.data.loader import IGNORED, MicroBatch, StepBatch, joined
from distlora.data.rows import EMPTY


class Stack(NamedTuple):
    """Rows that run at once."""

    batch: MicroBatch
    steps: Tensor
    """(B,) step of each row."""
    owners: list[tuple[int, int]]
    """(trial, its rows), from the first row on; a trial may come several times."""

    def split(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(trial, its part) of a number for each row, (B,)."""
        parts = rows.split([count for _, count in self.owners])
        return zip((owner for owner, _ in self.owners), parts, strict=True)

    def mean_losses(self, rows: Tensor, units: Sequence[int]) -> list[Tensor]:
        """Return each trial's contribution to its step's loss, from loss sums (B,); 0 without rows here."""
        sums: list[Tensor | None] = [None] * len(units)
        for owner, losses in self.split(rows):
            loss, before = losses.sum() / units[owner], sums[owner]
            sums[owner] = loss if before is None else before + loss
        return [rows.new_zeros(()) if loss is None else loss for loss in sums]


def stacks(batches: Sequence[StepBatch], steps: Sequence[int], *, whole: bool) -> list[Stack]:
    """Return the micro-batches of K trials stacked together; a trial with fewer is absent from the last ones.

    `whole`: as one batch, in which every micro-batch has as many rows, for blocks that cut it up themselves.
    """
    number = max(len(batch.micro_batches) for batch in batches)
    pieces = [list(_pieces(batches, index, fill=whole)) for index in range(number)]
    return [_stack(each, steps) for each in ([list(itertools.chain(*pieces))] if whole else pieces)]


def _pieces(batches: Sequence[StepBatch], index: int, *, fill: bool) -> Iterator[tuple[int, MicroBatch]]:
    """Yield (trial, its micro-batch `index`); `fill`: empty rows where a trial has none."""
    for owner, batch in enumerate(batches):
        own = batch.micro_batches
        if index < len(own):
            yield owner, own[index]
        elif fill:
            labels, rows = torch.full_like(own[0].labels, IGNORED), torch.full_like(own[0].rows, EMPTY)
            yield owner, own[0]._replace(labels=labels, rows=rows)


def _stack(pieces: Sequence[tuple[int, MicroBatch]], steps: Sequence[int]) -> Stack:
    owners = [(owner, len(batch.rows)) for owner, batch in pieces]
    counts = torch.tensor([count for _, count in owners])
    of_rows = torch.tensor([steps[owner] for owner, _ in owners]).repeat_interleave(counts)
    return Stack(joined([batch for _, batch in pieces]), of_rows, owners)
