"""Document losses: the loss of each held-out document, from the losses of an evaluation's pieces.

Letters: N rows, L tokens per row, P pieces.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from distlora.data.loader import MicroBatch
from distlora.data.rows import REJECTED, STARTS, TRAINED, PackedRows
from distlora.parallel import Backend
from distlora.run_folder.eval_documents import DocumentRecord

_ROWS_AT_ONCE = 1024
"""Rows whose flags are examined together: a few MB."""


class DocumentLosses:
    """Document losses of one rank for a split. One object per run; each evaluation starts with `begin`."""

    def __init__(self, rows: PackedRows) -> None:
        assert rows.documents is not None, "rows that were made in memory"
        self.rows = rows
        self._bounds = np.concatenate([[0], np.cumsum(pieces_of_rows(rows))])  # (N + 1,), like Packing.row_bounds.
        self._has_pairs = bool((rows.pairs > 0).any())
        self._digest: str | None = None
        self.begin()

    def begin(self) -> None:
        """Reset the sums."""
        self._losses = np.zeros(self._bounds[-1], np.float64)
        self._units = np.zeros(self._bounds[-1], np.int64)
        self._pending: tuple[MicroBatch, Tensor] | None = None

    def add(self, batch: MicroBatch, losses: Tensor) -> None:
        """Add an evaluated micro-batch: `losses` (B, U) of each token, or of each pair of a row in order.

        They are read with the next call, so that the device has work while the host waits.
        """
        self._read()
        self._pending = batch, losses

    def _read(self) -> None:
        if self._pending is None:
            return
        batch, losses = self._pending[0], self._pending[1].double().cpu().numpy()
        self._pending = None
        rows = batch.rows.numpy()
        if self._has_pairs:
            number = np.broadcast_to(np.arange(losses.shape[1]), losses.shape)
            counts = (rows >= 0)[:, None] & (number < self.rows.pairs[rows][:, None])
        else:
            number = np.cumsum(batch.position_ids.numpy() == 0, axis=1) - 1
            counts = batch.labels.numpy() >= 0
        piece = (self._bounds[rows][:, None] + number)[counts]
        np.add.at(self._losses, piece, losses[counts])  # In a fixed order, one after the other.
        np.add.at(self._units, piece, 1)

    def record(self, step: int, backend: Backend) -> DocumentRecord:
        """Return all ranks' sums since `begin`, after `step` optimizer steps. Every rank must call it."""
        self._read()
        device = backend.ranks.device
        losses = backend.sum_over_ranks(torch.from_numpy(self._losses).to(device)).cpu().numpy()
        units = backend.sum_over_ranks(torch.from_numpy(self._units).to(device)).cpu().numpy()
        assert self.rows.documents is not None
        numbers, document = np.unique(self.rows.documents, return_inverse=True)
        by_document, units_of = np.zeros(len(numbers), np.float64), np.zeros(len(numbers), np.int64)
        np.add.at(by_document, document, losses)
        np.add.at(units_of, document, units)
        self._digest = self._digest or digest_of(self.rows)
        return DocumentRecord(
            step=step,
            rows=self._digest,
            documents=numbers.tolist(),
            losses=[loss if np.isfinite(loss) else None for loss in by_document.tolist()],
            units=units_of.tolist(),
        )


def pieces_of_rows(rows: PackedRows) -> np.ndarray:
    """Count the pieces of each row, (N,) int64: documents that start in it, without rejected answers and padding.

    Padding has no label. Raises ValueError if the counts differ from the documents recorded for the rows.
    """
    counts = np.zeros(len(rows), np.int64)
    last = rows.sequence_length - 1
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        flags = np.asarray(rows.flags[first : first + _ROWS_AT_ONCE])
        starts = (flags & STARTS != 0) & (flags & REJECTED == 0)
        last_start = last - np.argmax(flags[:, ::-1] & STARTS != 0, axis=1)
        last_label = last - np.argmax(flags[:, ::-1] & TRAINED != 0, axis=1)
        counts[first : first + len(flags)] = np.count_nonzero(starts, axis=1) - (last_label < last_start)
    documents = 0 if rows.documents is None else len(rows.documents)
    if counts.sum() != documents:
        raise ValueError(f"{rows.folder}: {counts.sum():,} pieces in the held-out rows, and {documents:,} documents")
    return counts


def digest_of(rows: PackedRows) -> str:
    """Return the SHA-256, in hex, of a split's rows and their documents."""
    digest = hashlib.sha256()
    for array in (rows.tokens, rows.flags, rows.documents):
        assert array is not None
        for first in range(0, len(array), _ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(array[first : first + _ROWS_AT_ONCE]).data)
    return digest.hexdigest()
