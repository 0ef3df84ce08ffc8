"""The micro-batches of several trials on top of each other: what runs as one forward, and whose rows are where.

Letters: B rows of a micro-batch, K trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.data.loader import EMPTY, MicroBatch, StepBatch


class Share(NamedTuple):
    """One trial's rows of a step, or of a part of its evaluation."""

    batch: StepBatch
    slot: int | None
    """Which adapter its rows use; None: the only one."""
    step: int | None
    """The optimizer step, from 0; None in an evaluation."""


class Stack(NamedTuple):
    """Rows that run at once."""

    batch: MicroBatch
    step: int | Tensor | None
    """That all rows are in, or (B,) of each; None in an evaluation."""
    owners: list[tuple[int, int]]
    """(trial, its rows), from the first row on; a trial may come several times."""

    def of_owners(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(trial, its part) of a number for each row, (B,), or of several, (B, ...)."""
        if len(self.owners) == 1:
            return iter([(self.owners[0][0], rows)])
        parts = rows.split([count for _, count in self.owners])
        return zip((owner for owner, _ in self.owners), parts, strict=True)

    def batches_of_owners(self) -> Iterator[tuple[int, MicroBatch]]:
        """(trial, its rows)."""
        for parts in zip(*(self.of_owners(column) for column in self.batch[:4]), strict=True):
            yield parts[0][0], MicroBatch(*(part for _, part in parts))


def stacks(shares: Sequence[Share], *, whole: bool) -> list[Stack]:
    """All that the K shares hold, micro-batch by micro-batch; a trial that has fewer of them is not in the last ones.

    `whole`: as one batch, in which every micro-batch has as many rows, for blocks that cut it up themselves.
    """
    number = max(len(share.batch.micro_batches) for share in shares)
    pieces = [list(_pieces(shares, index, fill=whole)) for index in range(number)]
    if whole:
        return [_stack([piece for of_index in pieces for piece in of_index])]
    return [_stack(of_index) for of_index in pieces]


class _Piece(NamedTuple):
    owner: int
    share: Share
    batch: MicroBatch


def _pieces(shares: Sequence[Share], index: int, *, fill: bool) -> Iterator[_Piece]:
    """The micro-batch `index` of each trial; `fill`: empty rows where a trial has none."""
    for owner, share in enumerate(shares):
        own = share.batch.micro_batches
        if index < len(own):
            yield _Piece(owner, share, own[index])
        elif fill:
            yield _Piece(owner, share, _emptied(own[0]))


def _emptied(batch: MicroBatch) -> MicroBatch:
    """As many rows, none of which counts."""
    return batch._replace(labels=torch.full_like(batch.labels, -100), rows=torch.full_like(batch.rows, EMPTY))


def _stack(pieces: Sequence[_Piece]) -> Stack:
    owners = [(piece.owner, len(piece.batch.rows)) for piece in pieces]
    first = pieces[0].share
    if first.slot is None:
        assert len({piece.owner for piece in pieces}) == 1, "several trials need slots"
        return Stack(_joined([piece.batch for piece in pieces]), first.step, [(0, sum(count for _, count in owners))])
    slots = [piece.share.slot for piece in pieces]
    assert None not in slots, "a trial without a slot beside others"
    counts = torch.tensor([count for _, count in owners])
    batch = _joined([piece.batch for piece in pieces])._replace(slots=torch.tensor(slots).repeat_interleave(counts))
    steps = [piece.share.step for piece in pieces]
    if None in steps:
        return Stack(batch, None, owners)
    return Stack(batch, torch.tensor(steps).repeat_interleave(counts), owners)


def _joined(batches: Sequence[MicroBatch]) -> MicroBatch:
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(batch[:4] for batch in batches), strict=True)
    return MicroBatch(*(torch.cat(tensors) for tensors in columns))
