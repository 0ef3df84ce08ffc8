"""Process reward model (Lightman et al. 2023, arXiv 2305.20050): which steps of an answer are right.

Letters: B rows, T tokens per row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.data.loader import MicroBatch
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.training.objectives.objective import Losses, Objective, run, send


class ProcessReward(Objective):
    """-log p of each step's class, wrong (0) or right (1), at the step's last token."""

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses of the labels."""
        sent = send(batch, device)
        outputs = run(model, batch, sent, step, LossForm(by_token=True))
        losses = F.cross_entropy(outputs.flatten(0, 1), sent.labels.flatten(), reduction="none").view(sent.labels.shape)
        with torch.no_grad():
            right = ((outputs[..., 1] > outputs[..., 0]).long() == sent.labels).float()
        return Losses(losses.sum(dim=1), right.sum()[None], losses if step is None else None)
