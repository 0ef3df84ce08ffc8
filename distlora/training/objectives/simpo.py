"""SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6)."""

from __future__ import annotations

from torch import Tensor

from distlora.training.objectives.pairs import Answers, PairObjective, preference_loss


class SimPO(PairObjective):
    """-log sigmoid(r(chosen) - r(rejected) - gamma) of each pair, without a reference.

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
