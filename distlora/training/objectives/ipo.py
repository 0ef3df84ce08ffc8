"""IPO (Azar et al. 2023, arXiv 2310.12036, equation 17)."""

from __future__ import annotations

from torch import Tensor

from distlora.training.objectives.pairs import Answers, PairObjective


class IPO(PairObjective):
    """(h - 1 / (2 beta))^2 of each pair: beta is the paper's tau, h = h(chosen) - h(rejected).

    h of an answer is log p(answer) - log p_ref(answer), here the mean over its tokens: TRL does so too, and says that
    the paper's results were computed so. Rewards are beta * h, with the
    means that the loss compares; TRL logs them of sums.
    """

    def pair_losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss and rewards."""
        assert answers.ratios is not None
        beta, ratios = self.train.of_objective("beta"), answers.per_token(answers.ratios)
        chosen, rejected = ratios.unbind(dim=-1)
        return (chosen - rejected - 1 / (2 * beta)) ** 2, beta * ratios
