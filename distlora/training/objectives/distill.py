"""Distillation: cross-entropy mixed with a divergence from a teacher (`model/distillation.py` has the formulas)."""

from __future__ import annotations

import torch
from torch import Tensor

from distlora.config import RolloutConfig, TrainConfig
from distlora.data.loader import MicroBatch
from distlora.model.build import CausalLM
from distlora.model.distillation import Divergence
from distlora.model.lm_head import LossForm
from distlora.training.objectives.objective import Losses, Objective, run, send


class Distill(Objective):
    """(1 - kd_ratio) of -log p of each target token, and kd_ratio of the divergence from the teacher's distribution.

    The teacher runs in the reference pass: the initial model, or the base with the adapter at train.teacher. TRL's
    GKDTrainer has the second term alone (kd_ratio = 1). On-policy, the tokens are those of answers that the student has
    sampled, and the second term is alone (GKD's lambda = 1); sampling has no gradient.
    """

    def __init__(self, train: TrainConfig, rollout: RolloutConfig) -> None:
        super().__init__(train, rollout)
        ratio = train.of_objective("kd_ratio") if "kd_ratio" in self.needs.settings else 1.0
        self.divergence = Divergence(train.of_objective("beta"), train.of_objective("kd_temperature"), ratio)

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses; in an evaluation also those of each token."""
        sent = send(batch, device)
        losses, divergences = run(model, batch, sent, step, LossForm(with_reference=True, divergence=self.divergence))
        return Losses(losses.sum(dim=1), divergences.detach().sum()[None], losses if step is None else None)
