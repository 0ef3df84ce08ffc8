"""Objectives of pairs: a chosen and a rejected answer to the same prompt, side by side in one row.

Letters: B rows, T tokens per row, P most pairs per row.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.data.loader import MicroBatch, StepBatch
from distlora.model.build import CausalLM
from distlora.training.objectives.objective import Losses, Objective, run, send


class Answers(NamedTuple):
    """Numbers of the pairs' answers, (B, P, 2): chosen, rejected. What stands for a pair that a row lacks is unused."""

    logps: Tensor
    """log p(answer), summed over its trained tokens."""
    ratios: Tensor | None
    """log p(answer) - log p_ref(answer), summed token by token: the two sums are large and nearly equal. None without
    a reference."""
    lengths: Tensor
    """Number of its trained tokens."""

    def per_token(self, sums: Tensor) -> Tensor:
        """Return the sums (B, P, 2) over an answer's tokens as means; 0 for an answer that a row lacks."""
        return sums / self.lengths.clamp(min=1)


class PairObjective(Objective):
    """A loss per pair of answers. A subclass has the formula.

    train.sft_weight adds -log p of the chosen answer, a mean over its tokens. TRL's `sft` loss and its `cpo_alpha` take
    the mean over all tokens of a rank's batch instead, which depends on how pairs are distributed.
    """

    @property
    def sft_weight(self) -> float:
        """Return the weight of -log p of the chosen answer."""
        return self.train.of_objective("sft_weight")

    def units(self, batch: StepBatch) -> int:
        """Return the pairs of the step, over all ranks."""
        return batch.global_pairs

    @abstractmethod
    def of_pairs(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss (B, P), and the rewards of its answers (B, P, 2), of which metrics are made."""

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses of the pairs."""
        sent = send(batch, device)
        # Before the forward: a copy to the device that is queued after it makes the host wait for its end.
        sides, is_pair = pair_sides(sent.position_ids, sent.labels, most_pairs(batch))
        if self.needs.reference:
            policy, reference = run(model, batch, sent, step, with_reference=True)
            ratios = sums_of(reference - policy, sides)
        else:
            policy, ratios = run(model, batch, sent, step, by_token=True), None
        answers = Answers(-sums_of(policy, sides), ratios, sums_of((sent.labels >= 0).float(), sides))
        losses, rewards = self.of_pairs(answers)
        if (weight := self.sft_weight) > 0:
            losses = losses - weight * answers.per_token(answers.logps)[..., 0]
        losses = torch.where(is_pair, losses, 0.0)
        with torch.no_grad():
            chosen, rejected = rewards.unbind(dim=-1)
            logps = answers.logps.unbind(dim=-1)
            figures = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), *logps)
            sums = torch.stack([torch.where(is_pair, figure, 0.0).sum() for figure in figures])
        return Losses(losses.sum(dim=1), sums, losses if step is None else None)


def preference_loss(margins: Tensor, label_smoothing: float) -> Tensor:
    """Return -log sigmoid(margin) of the margins between rewards.

    With label smoothing e: -(1 - e) log sigmoid(margin) - e log sigmoid(-margin) (cDPO: Mitchell 2023, "A note on DPO
    with noisy preferences & relationship to IPO").
    """
    losses = F.softplus(-margins)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses + label_smoothing * F.softplus(margins)


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


def sums_of(values: Tensor, sides: Tensor) -> Tensor:
    """Sum values (B, T) over sides (B, P, 2, T) -> (B, P, 2). Scatter has no fixed summation order on a GPU."""
    return torch.where(sides, values[:, None, None, :], 0.0).sum(dim=-1)
