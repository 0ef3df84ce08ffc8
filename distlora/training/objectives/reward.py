"""Reward model (Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155, equation 1).

The margin is Llama 2's (arXiv 2307.09288, equation 2), the centering of rewards Eisenstein et al.'s (arXiv 2312.09244).
Letters: B rows, T tokens per row, P most pairs per row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.data.loader import MicroBatch
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.training.objectives.objective import Losses, Objective, run, send
from distlora.training.objectives.pairs import pair_sums, pairs_of


class RewardModel(Objective):
    """-log sigmoid(r(chosen) - r(rejected) - margin) + center_rewards (r(chosen) + r(rejected))^2 of each pair.

    The reward r of an answer is the score at its last token that is not config.json's pad_token_id, where transformers'
    class takes it; often that is the end-of-text token too. A pair without a margin has 0.
    """

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses of the pairs."""
        sent = send(batch, device)
        sides = pairs_of(sent.position_ids, batch)
        is_pair = pair_sums((sent.labels >= 0).float(), sides)[..., 1] > 0
        scores = run(model, batch, sent, step, LossForm(by_token=True))
        pad = model.hf_config.pad_token_id
        rewards = pair_sums(scores, last_of(sides, sent.input_ids != (-1 if pad is None else pad)))
        chosen, rejected = rewards.unbind(dim=-1)
        difference = chosen - rejected
        margins = 0.0 if sent.margins is None else sent.margins[:, : is_pair.shape[1]]
        losses = F.softplus(margins - difference)
        if (weight := self.train.of_objective("center_rewards")) > 0:
            losses = losses + weight * (chosen + rejected) ** 2
        losses = torch.where(is_pair, losses, 0.0)
        with torch.no_grad():
            figures = (chosen, rejected, difference, (difference > 0).float())
            sums = torch.stack([torch.where(is_pair, figure, 0.0).sum() for figure in figures])
        return Losses(losses.sum(dim=1), sums, losses if step is None else None)


def last_of(sides: Tensor, counts: Tensor) -> Tensor:
    """Return a mask like sides (B, 2 P, T) of the last token of each that counts (B, T)."""
    place = torch.arange(sides.shape[-1], device=sides.device)
    return place == torch.where(sides & counts[:, None, :], place, -1).amax(dim=-1, keepdim=True)
