"""Define what a run minimizes: a loss per token (sft) or per pair of answers (dpo), as sums over ranks.

An objective turns a micro-batch into loss sums per row, with gradient, and sums of the metrics reported beside the
loss. Both are divided by the step's number of units (target tokens, pairs) over all ranks and micro-batches, which the
loader knows in advance, so nothing depends on how rows are distributed. Nothing is read from the device.

Letters: B rows, T tokens per row, P most pairs per row, F metrics. In document losses: N rows, L tokens per row, P
pieces.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.config import TrainConfig
from distlora.data.loader import MicroBatch, StepBatch
from distlora.data.rows import REJECTED, STARTS, TRAINED, PackedRows
from distlora.model.adapters import StepRows
from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from distlora.parallel import Backend
from distlora.run_folder.eval_documents import DocumentRecord


class Losses(NamedTuple):
    """Losses of one micro-batch."""

    rows: Tensor
    """(B,) fp32: loss sums per row."""
    figures: Tensor
    """(F,) fp32 without gradient: sums of the objective's metrics over the rows' units."""
    units: Tensor | None = None
    """Loss per token (B, T), 0 without a target, or per pair of a row (B, P); only in an evaluation."""


class NextToken:
    """Next-token loss: -log p of each target token."""

    unit = "target_tokens"
    """Name of the metric that counts a step's units."""
    figures: tuple[str, ...] = ()
    """Names of the metrics beside the loss; each is a mean over the units."""
    has_reference = False
    """True if every row runs forward a second time, without gradient."""

    def units(self, batch: StepBatch) -> int:
        """Return the target tokens of the step, over all ranks."""
        return batch.global_targets

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses.

        `step` is the training step of the rows, or (B,) of each; None: an evaluation, no dropout.
        """
        losses = _run(model, batch, _on(device, batch), step, by_token=step is None)
        rows = losses.sum(dim=1) if step is None else losses
        return Losses(rows, rows.new_zeros(0), losses if step is None else None)


class Preference:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(r(chosen) - r(rejected)) of each pair.

    The reward of an answer is r = beta * (log p(answer) - log p_ref(answer)). The reference is the initial model.
    """

    unit = "pairs"
    figures: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    """TRL's names. accuracies: fraction of the pairs whose chosen answer has the higher reward."""
    has_reference = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def units(self, batch: StepBatch) -> int:
        """Return the pairs of the step, over all ranks."""
        return batch.global_pairs

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the DPO losses of the pairs."""
        sent = _on(device, batch)
        # Before the forward: a copy to the device that is queued after it makes the host wait for its end.
        sides, is_pair = pair_sides(sent.position_ids, sent.labels, most_pairs(batch))
        policy, reference = _run(model, batch, sent, step, with_reference=True)
        # Per token, because the two sums are large and nearly equal.
        rewards = self.beta * _sums(reference - policy, sides)
        chosen, rejected = rewards.unbind(dim=-1)
        losses = torch.where(is_pair, F.softplus(rejected - chosen), 0.0)
        with torch.no_grad():
            logps = -_sums(policy, sides)
            figures = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), logps[..., 0], logps[..., 1])
            sums = torch.stack([torch.where(is_pair, figure, 0.0).sum() for figure in figures])
        return Losses(losses.sum(dim=1), sums, losses if step is None else None)


def objective_of(config: TrainConfig) -> NextToken | Preference:
    """Return the objective of train.objective."""
    return Preference(config.dpo_beta) if config.objective == "dpo" else NextToken()


def most_pairs(batch: MicroBatch) -> int:
    """Return P from the host's positions: documents are chosen, rejected, chosen, rejected, ..., padding."""
    return int((batch.position_ids == 0).sum(dim=1).max()) // 2


def pair_sides(position_ids: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return masks (B, P, 2, T) bool of each pair's chosen and rejected tokens, and (B, P) bool of existing pairs.

    From position_ids and labels (B, T) and P = `most`, on their device, without a host read.
    """
    document = (position_ids == 0).cumsum(dim=1) - 1
    number = torch.arange(2 * most, device=position_ids.device).view(1, most, 2, 1)
    sides = document[:, None, None, :] == number
    return sides, (sides[:, :, 1] & (labels >= 0)[:, None, :]).any(dim=-1)


def _sums(values: Tensor, sides: Tensor) -> Tensor:
    """Sum values (B, T) over sides (B, P, 2, T) -> (B, P, 2). Scatter has no fixed summation order on a GPU."""
    return torch.where(sides, values[:, None, None, :], 0.0).sum(dim=-1)


def _on(device: torch.device, batch: MicroBatch) -> MicroBatch:
    return MicroBatch._make(None if tensor is None else _to_device(tensor, device) for tensor in batch)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device. The host does not wait for the copy.

    It would from memory that is not pinned. torch keeps pinned memory, and takes it again once its copy is done.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _run(
    model: CausalLM,
    batch: MicroBatch,
    sent: MicroBatch,
    step: int | Tensor | None,
    *,
    with_reference: bool = False,
    by_token: bool = False,
) -> Tensor:
    """Run the model: loss sums (B,); `by_token`: (B, T); `with_reference`: of it and the initial model, (2, B, T)."""
    device = sent.input_ids.device
    steps = _to_device(step, device) if isinstance(step, Tensor) else step
    return model(
        sent.input_ids,
        sent.position_ids,
        sent.labels,
        adapter_rows=sent.slots,
        step_rows=None if steps is None else StepRows(steps, sent.rows),
        documents=Documents.of(batch.position_ids).to(device) if model.attends_by_documents else None,
        with_reference=with_reference,
        by_token=by_token,
    )


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
