"""ORPO (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.training.objectives.pairs import Answers, PairObjective


class ORPO(PairObjective):
    """-log P(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)) of each pair, without a reference.

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
