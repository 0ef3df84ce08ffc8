"""Next-token loss: -log p of each target token."""

from __future__ import annotations

import torch
from torch import Tensor

from distlora.data.loader import MicroBatch, StepBatch
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.training.objectives.objective import Losses, Objective, run, send


class NextToken(Objective):
    """Next-token loss: -log p of each target token."""

    def units(self, batch: StepBatch) -> int:
        """Return the target tokens of the step, over all ranks."""
        return batch.global_targets

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses; in an evaluation also those of each token."""
        losses = run(model, batch, send(batch, device), step, LossForm(by_token=step is None))
        rows = losses.sum(dim=1) if step is None else losses
        return Losses(rows, rows.new_zeros(0), losses if step is None else None)
