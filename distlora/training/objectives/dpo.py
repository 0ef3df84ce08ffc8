"""DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7) and cDPO."""

from __future__ import annotations

from torch import Tensor

from distlora.training.objectives.pairs import Answers, PairObjective, preference_loss


class DPO(PairObjective):
    """-log sigmoid(r(chosen) - r(rejected)) of each pair; with train.label_smoothing cDPO (`preference_loss`).

    The reward of an answer is r = beta * (log p(answer) - log p_ref(answer)). The reference is the initial model.
    """

    def pair_losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return each pair's loss and rewards."""
        assert answers.ratios is not None
        rewards = self.train.of_objective("beta") * answers.ratios
        chosen, rejected = rewards.unbind(dim=-1)
        return preference_loss(chosen - rejected, self.train.of_objective("label_smoothing")), rewards
