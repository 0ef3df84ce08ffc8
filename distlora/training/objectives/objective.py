"""Define an objective, what a run minimizes, as sums over the ranks; and the simplest one, the next-token loss.

An objective turns a micro-batch into loss sums per row, with gradient, and sums of the metrics reported beside the
loss. Both are divided by the step's number of units (target tokens, pairs) over all ranks and micro-batches, which the
loader knows in advance, so nothing depends on how rows are distributed. Nothing is read from the device.

Letters: B rows, T tokens per row, D most documents and P most pairs per row, F metrics, M of which the largest counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.config import RolloutConfig, TrainConfig
from distlora.config.objectives import ObjectiveNeeds
from distlora.data.loader import MicroBatch, StepBatch
from distlora.model.adapters import StepRows
from distlora.model.build import CausalLM
from distlora.model.images import Images
from distlora.model.lm_head import SUMS, LossForm
from distlora.parallel import Backend
from distlora.system.transfer import to_device


class Losses(NamedTuple):
    """Losses of one micro-batch."""

    rows: Tensor
    """(B,) fp32: loss sums per row."""
    figures: Tensor
    """(F,) fp32 without gradient: sums of the objective's metrics over the rows' units."""
    units: Tensor | None = None
    """Loss per token (B, T), 0 without a target, or per pair of a row (B, P); only in an evaluation."""
    maxima: Tensor | None = None
    """(M,) fp32 without gradient: the objective's metrics of which the largest counts."""


class Objective(ABC):
    """Loss that a run minimizes. `config/objectives.py` says what it needs."""

    def __init__(self, train: TrainConfig, rollout: RolloutConfig) -> None:
        self.needs: ObjectiveNeeds = train.needs
        self.train, self.rollout = train, rollout

    def units(self, batch: StepBatch) -> int:
        """Return the units of the step, over all ranks: pairs, judged answers or labels; 1 if there are no labels."""
        return batch.global_pairs if self.needs.data in ("pairs", "judged") else max(batch.global_targets, 1)

    def prepare(  # noqa: B027 (most objectives need nothing)
        self, model: CausalLM, mismatched: Iterable[MicroBatch], units: int, backend: Backend
    ) -> None:
        """Compute without gradient what the losses of a step, or of an evaluation's batch, need of all its rows.

        Every rank calls it before the losses. `mismatched`: StepBatch.mismatched; `units`: `units` of the step.
        """

    @abstractmethod
    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses.

        `step` is the training step of the rows, or (B,) of each; None: an evaluation, no dropout.
        """

    def check(self, step: int, figures: Mapping[str, float]) -> None:  # noqa: B027
        """Raise an error if the metrics of a step, counted from 1, show that the run must not go on."""


class NextToken(Objective):
    """Next-token loss: -log p of each target token."""

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses; in an evaluation also those of each token."""
        losses = run(model, batch, send(batch, device), step, LossForm(by_token=step is None))
        rows = losses.sum(dim=1) if step is None else losses
        return Losses(rows, rows.new_zeros(0), losses if step is None else None)


def send(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return the micro-batch on the device, without waiting for it."""
    return MicroBatch._make(to_device(item, device) if isinstance(item, Tensor) else item for item in batch)


def most_documents(batch: MicroBatch) -> int:
    """Return D, the most documents of a row, from the host's positions; padding counts as one."""
    return int((batch.position_ids == 0).sum(dim=1).max())


def document_masks(position_ids: Tensor, most: int) -> Tensor:
    """Return a mask (B, D, T) of each document's tokens, D = `most`, from position_ids (B, T). No host read."""
    number = torch.arange(most, device=position_ids.device)[:, None]
    return (position_ids == 0).cumsum(dim=1)[:, None] - 1 == number


def sums_of(values: Tensor, documents: Tensor) -> Tensor:
    """Sum values (B, T) over documents (B, D, T) -> (B, D). Scatter has no fixed summation order on a GPU."""
    return torch.where(documents, values[:, None], 0.0).sum(dim=-1)


def run(
    model: CausalLM,
    batch: MicroBatch,
    sent: MicroBatch,
    step: int | Tensor | None,
    losses: LossForm = SUMS,
) -> Tensor:
    """Run the model; return loss sums (B,), or what `losses` says. `sent`: the batch on the device."""
    device = sent.input_ids.device
    steps = to_device(step, device) if isinstance(step, Tensor) else step
    return model(
        sent.input_ids,
        sent.position_ids,
        sent.labels,
        adapter_rows=sent.slots,
        step_rows=None if steps is None else StepRows(steps, sent.rows),
        documents=model.documents_of(batch.position_ids, device),
        losses=losses,
        images=Images.of(
            batch.images, batch.is_image, batch.input_ids, batch.position_ids, model.merger, sent.input_ids.device
        ),
    )
