"""Objectives of pairs (DPO, IPO, ORPO, SimPO): two answers to the same prompt, chosen and rejected, side by side.

Letters: B rows, T tokens per row, P most pairs per row.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.data.loader import MicroBatch
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.training.objectives.objective import Losses, Objective, document_masks, most_documents, run, send, sums_of


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

    @abstractmethod
    def pair_losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss (B, P), and the rewards of its answers (B, P, 2), of which metrics are made."""

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses of the pairs."""
        sent = send(batch, device)
        # Before the forward: a copy to the device that is queued after it makes the host wait for its end.
        sides = pairs_of(sent.position_ids, batch)
        if self.needs.reference:
            policy, reference = run(model, batch, sent, step, LossForm(with_reference=True))
            ratios = pair_sums(reference - policy, sides)
        else:
            policy, ratios = run(model, batch, sent, step, LossForm(by_token=True)), None
        answers = Answers(-pair_sums(policy, sides), ratios, pair_sums((sent.labels >= 0).float(), sides))
        is_pair = answers.lengths[..., 1] > 0
        losses, rewards = self.pair_losses(answers)
        if (weight := self.sft_weight) > 0:
            losses = losses - weight * answers.per_token(answers.logps)[..., 0]
        losses = torch.where(is_pair, losses, 0.0)
        with torch.no_grad():
            chosen, rejected = rewards.unbind(dim=-1)
            logps = answers.logps.unbind(dim=-1)
            figures = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), *logps)
            sums = torch.stack([torch.where(is_pair, figure, 0.0).sum() for figure in figures])
        return Losses(losses.sum(dim=1), sums, losses if step is None else None)


class DPO(PairObjective):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) and cDPO.

    -log sigmoid(r(chosen) - r(rejected)) of each pair; with train.label_smoothing cDPO (`preference_loss`).
    The reward of an answer is r = beta * (log p(answer) - log p_ref(answer)). The reference is the initial model.
    """

    def pair_losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss and rewards."""
        assert answers.ratios is not None
        rewards = self.train.of_objective("beta") * answers.ratios
        chosen, rejected = rewards.unbind(dim=-1)
        return preference_loss(chosen - rejected, self.train.of_objective("label_smoothing")), rewards


class IPO(PairObjective):
    """IPO (Azar et al. 2023, arXiv 2310.12036, equation 17).

    (h - 1 / (2 beta))^2 of each pair: beta is the paper's tau, h = h(chosen) - h(rejected).
    h of an answer is log p(answer) - log p_ref(answer), here the mean over its tokens: TRL does so too, and says that
    the paper's results were computed so. Rewards are beta * h, with the means that the loss compares; TRL logs them of
    sums.
    """

    def pair_losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss and rewards."""
        assert answers.ratios is not None
        beta, ratios = self.train.of_objective("beta"), answers.per_token(answers.ratios)
        chosen, rejected = ratios.unbind(dim=-1)
        return (chosen - rejected - 1 / (2 * beta)) ** 2, beta * ratios


class ORPO(PairObjective):
    """ORPO (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

    -log P(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)) of each pair, without a reference.
    log P(answer) is the mean of log p over its tokens, odds = P / (1 - P), and beta is the paper's lambda. Rewards are
    beta * log P(answer), as in TRL.

    The first term is the paper's: the chosen answer given the prompt, a mean over the answer's tokens (LLaMA-Factory
    has the same). TRL's ORPOTrainer takes the prompt's tokens into it, and the mean over all tokens of a rank's batch.
    """

    def pair_losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss and rewards."""
        beta = self.train.of_objective("beta")
        # Below 0, because the odds of P = 1 are infinite; a row's missing answers have no tokens, and so P = 1.
        logps = answers.per_token(answers.logps).clamp(max=-torch.finfo(torch.float32).tiny)
        chosen, rejected = (logps - torch.log(-torch.expm1(logps))).unbind(dim=-1)
        return beta * F.softplus(rejected - chosen) - logps[..., 0], beta * logps

    @property
    def sft_weight(self) -> float:
        """Return 0: the loss has this term already."""
        return 0.0


class SimPO(PairObjective):
    """SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6).

    -log sigmoid(r(chosen) - r(rejected) - gamma) of each pair, without a reference.
    The reward of an answer is r = beta * log p(answer) / its tokens; gamma is train.target_margin. The defaults of the
    authors' code are beta = 2 and gamma = 0.5. TRL's CPOTrainer has this loss with loss_type=simpo and cpo_alpha=0; its
    defaults are beta = 0.1, gamma = 0.5 and cpo_alpha = 1, a term of the chosen answer (here train.sft_weight).
    """

    def pair_losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss and rewards."""
        setting = self.train.of_objective
        rewards = setting("beta") * answers.per_token(answers.logps)
        chosen, rejected = rewards.unbind(dim=-1)
        return preference_loss(chosen - rejected - setting("target_margin"), setting("label_smoothing")), rewards


def preference_loss(margins: Tensor, label_smoothing: float) -> Tensor:
    """Return -log sigmoid(margin) of the margins between rewards.

    With label smoothing e: -(1 - e) log sigmoid(margin) - e log sigmoid(-margin) (cDPO: Mitchell 2023, "A note on DPO
    with noisy preferences & relationship to IPO").
    """
    losses = F.softplus(-margins)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses + label_smoothing * F.softplus(margins)


def pairs_of(position_ids: Tensor, batch: MicroBatch) -> Tensor:
    """Return a mask (B, 2 P, T) of the answers' tokens from position_ids (B, T) on the device.

    Documents are chosen, rejected, chosen, rejected, ..., padding.
    """
    return document_masks(position_ids, most_documents(batch) // 2 * 2)


def pair_sums(values: Tensor, answers: Tensor) -> Tensor:
    """Sum values (B, T) over answers (B, 2 P, T) -> (B, P, 2)."""
    return sums_of(values, answers).unflatten(1, (-1, 2))
