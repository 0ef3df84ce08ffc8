"""What a run minimizes: a loss a token (sft) or a loss a pair of answers (dpo), as sums over ranks and micro-batches.

An objective turns a micro-batch into loss sums per row, with gradient, and the sums of the figures that are reported
beside the loss. Both are divided by the step's number of units (target tokens, pairs) over all ranks and micro-batches,
which the loader knows in advance: so nothing depends on how rows are spread. Nothing is read from the device.

Letters: B rows, T tokens of a row, P most pairs of a row, F figures.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.config import TrainConfig
from distlora.data.loader import MicroBatch, StepBatch
from distlora.model.adapters import StepRows
from distlora.model.attention import Documents
from distlora.model.build import CausalLM


class Losses(NamedTuple):
    """Of one micro-batch."""

    rows: Tensor
    """(B,) fp32: loss sums per row."""
    figures: Tensor
    """(F,) fp32 without gradient: sums of the objective's figures over the rows' units."""
    units: Tensor | None = None
    """Of an evaluation: the loss of each token (B, T), 0 where there is no target, or of each pair of a row (B, P)."""


class Objective(Protocol):
    figures: tuple[str, ...]
    """Names of what is reported beside the loss; each is a mean over the units."""
    has_reference: bool
    """Whether every row runs forward a second time, without gradient."""

    def units(self, batch: StepBatch) -> int:
        """What the sums of a step are divided by."""
        ...

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """`step` is the training step that the rows are in, or (B,) that of each; None: an evaluation, no dropout."""
        ...


def objective_of(config: TrainConfig) -> Objective:
    return Preference(config.dpo_beta) if config.objective == "dpo" else NextToken()


class NextToken:
    """-log p of each target token."""

    figures: tuple[str, ...] = ()
    has_reference = False

    def units(self, batch: StepBatch) -> int:
        return batch.global_targets

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        losses = _run(model, batch, _Sent.of(batch, device), step, by_token=step is None)
        rows = losses.sum(dim=1) if step is None else losses
        return Losses(rows, rows.new_zeros(0), losses if step is None else None)


class Preference:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(r(chosen) - r(rejected)) of each pair, with the reward of an
    answer r = beta * (log p(answer) - log p_ref(answer)); the reference is the model as it started.
    """

    figures: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    """TRL's names. accuracies: the share of the pairs whose chosen answer has the higher reward."""
    has_reference = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def units(self, batch: StepBatch) -> int:
        return batch.global_pairs

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        sent = _Sent.of(batch, device)
        # Before the forward: what is sent once that is queued makes the host wait for its end.
        sides, is_pair = pair_sides(sent.position_ids, sent.labels, most_pairs(batch))
        policy, reference = _run(model, batch, sent, step, with_reference=True)
        # Token by token: the two sums are large and nearly equal.
        rewards = self.beta * _sums(reference - policy, sides)
        chosen, rejected = rewards.unbind(dim=-1)
        losses = torch.where(is_pair, F.softplus(rejected - chosen), 0.0)
        with torch.no_grad():
            logps = -_sums(policy, sides)
            figures = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), logps[..., 0], logps[..., 1])
            sums = torch.stack([torch.where(is_pair, figure, 0.0).sum() for figure in figures])
        return Losses(losses.sum(dim=1), sums, losses if step is None else None)


def most_pairs(batch: MicroBatch) -> int:
    """P: a row's documents are chosen, rejected, chosen, rejected, ..., and the padding. The host knows it."""
    return int((batch.position_ids == 0).sum(dim=1).max()) // 2


def pair_sides(position_ids: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """position_ids and labels (B, T), P = `most` -> (B, P, 2, T) bool: the tokens of each pair's chosen and rejected
    document; (B, P) bool: which pairs are there. Made where its inputs are, from which nothing is read.
    """
    document = (position_ids == 0).cumsum(dim=1) - 1
    number = torch.arange(2 * most, device=position_ids.device).view(1, most, 2, 1)
    sides = document[:, None, None, :] == number
    return sides, (sides[:, :, 1] & (labels >= 0)[:, None, :]).any(dim=-1)


def _sums(values: Tensor, sides: Tensor) -> Tensor:
    """values (B, T) over sides (B, P, 2, T) -> (B, P, 2). Not by scatter, whose sums on a GPU have no fixed order."""
    return torch.where(sides, values[:, None, None, :], 0.0).sum(dim=-1)


class _Sent(NamedTuple):
    """A micro-batch's tensors on the device."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    rows: Tensor
    slots: Tensor | None

    @classmethod
    def of(cls, batch: MicroBatch, device: torch.device) -> _Sent:
        tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.rows)
        input_ids, position_ids, labels, rows = (tensor.to(device, non_blocking=True) for tensor in tensors)
        slots = None if batch.slots is None else batch.slots.to(device, non_blocking=True)
        return cls(input_ids, position_ids, labels, rows, slots)


def _run(
    model: CausalLM,
    batch: MicroBatch,
    sent: _Sent,
    step: int | Tensor | None,
    *,
    with_reference: bool = False,
    by_token: bool = False,
) -> Tensor:
    """The model's loss sums (B,); `by_token`: each token's loss (B, T); `with_reference`: in it and as it started,
    (2, B, T)."""
    device = sent.input_ids.device
    steps = step.to(device, non_blocking=True) if isinstance(step, Tensor) else step
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
