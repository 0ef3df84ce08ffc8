"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8).

Letters: B rows, T tokens per row, P most answers per row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distlora.data.loader import MicroBatch, StepBatch
from distlora.model.build import CausalLM
from distlora.parallel import Backend
from distlora.training.objectives.objective import Losses, Objective, run, send


class KTO(Objective):
    """w (1 - sigmoid(beta (r - KL))) of a good answer, w (1 - sigmoid(beta (KL - r))) of a bad one.

    r = log p(answer) - log p_ref(answer), with the initial model as the reference. w is train.desirable_weight or
    train.undesirable_weight. KL estimates the distance of the two models: the mean of r over the step's mismatched
    prompts and answers, no less than 0, without gradient.
    """

    _kl: Tensor | None = None
    """Estimate of this step, on the device."""

    def units(self, batch: StepBatch) -> int:
        """Return the judged answers of the step, over all ranks."""
        return batch.global_pairs

    def prepare(self, model: CausalLM, mismatched: Iterable[MicroBatch], units: int, backend: Backend) -> None:
        """Estimate KL."""
        total = torch.zeros((), dtype=torch.float64, device=backend.ranks.device)
        for batch in mismatched:
            policy, reference = run(model, batch, send(batch, backend.ranks.device), None, with_reference=True)
            total += (reference - policy).double().sum()
        self._kl = (backend.sum_over_ranks(total) / units).clamp(min=0).float()

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses of the answers."""
        sent = send(batch, device)
        assert sent.judged is not None, "data of another objective"
        assert self._kl is not None, "`prepare` comes first"
        # Before the forward: a copy to the device that is queued after it makes the host wait for its end.
        number = torch.arange(int((batch.position_ids == 0).sum(dim=1).max()), device=device)[:, None]
        places = (sent.position_ids == 0).cumsum(dim=1)[:, None] - 1 == number
        verdicts = torch.where(places, sent.judged[:, None], 0).sum(dim=-1)
        policy, reference = run(model, batch, sent, step, with_reference=True)
        ratios = _sums(reference - policy, places)
        beta, weights = self.train.of_objective("beta"), map(self.train.of_objective, _WEIGHTS)
        good, bad = verdicts > 0, verdicts < 0
        losses = torch.sigmoid(beta * verdicts * (self._kl - ratios))
        losses = losses * sum(weight * side for weight, side in zip(weights, (good, bad), strict=True))
        with torch.no_grad():
            rewards, logps = beta * ratios, -_sums(policy, places)
            figures = [torch.where(side, each, 0.0).sum() for each in (rewards, logps) for side in (good, bad)]
            counts = good.sum(), bad.sum()
            sums = torch.stack([*figures, *counts, self._kl * sum(counts)])
        return Losses(losses.sum(dim=1), sums, losses if step is None else None)


_WEIGHTS = ("desirable_weight", "undesirable_weight")


def _sums(values: Tensor, places: Tensor) -> Tensor:
    """Sum values (B, T) over the places (B, P, T) of each document -> (B, P)."""
    return torch.where(places, values[:, None], 0.0).sum(dim=-1)
