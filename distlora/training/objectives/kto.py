"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distlora.data.loader import MicroBatch
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.parallel import Backend
from distlora.training.objectives.objective import Losses, Objective, document_masks, most_documents, run, send, sums_of


class KTO(Objective):
    """w (1 - sigmoid(beta (r - KL))) of a good answer, w (1 - sigmoid(beta (KL - r))) of a bad one.

    r = log p(answer) - log p_ref(answer), with the initial model as the reference. w is train.desirable_weight or
    train.undesirable_weight. KL estimates the distance of the two models: the mean of r over the step's mismatched
    prompts and answers, no less than 0, without gradient.
    """

    _kl: Tensor | None = None
    """Estimate of this step, on the device."""

    def prepare(self, model: CausalLM, mismatched: Iterable[MicroBatch], units: int, backend: Backend) -> None:
        """Estimate KL."""
        total = torch.zeros((), dtype=torch.float64, device=backend.ranks.device)
        for batch in mismatched:
            policy, reference = run(
                model, batch, send(batch, backend.ranks.device), None, LossForm(with_reference=True)
            )
            total += (reference - policy).double().sum()
        self._kl = (backend.sum_over_ranks(total) / units).clamp(min=0).float()

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses of the answers."""
        sent = send(batch, device)
        assert sent.judged is not None, "data of another objective"
        assert self._kl is not None, "`prepare` comes first"
        # Before the forward: a copy to the device that is queued after it makes the host wait for its end.
        documents = document_masks(sent.position_ids, most_documents(batch))
        verdicts = sums_of(sent.judged, documents)
        policy, reference = run(model, batch, sent, step, LossForm(with_reference=True))
        ratios = sums_of(reference - policy, documents)
        beta, good, bad = self.train.of_objective("beta"), verdicts > 0, verdicts < 0
        weights = self.train.of_objective("desirable_weight") * good
        weights = weights + self.train.of_objective("undesirable_weight") * bad
        losses = torch.sigmoid(beta * verdicts * (self._kl - ratios)) * weights
        with torch.no_grad():
            rewards, logps = beta * ratios, -sums_of(policy, documents)
            figures = [torch.where(side, values, 0.0).sum() for values in (rewards, logps) for side in (good, bad)]
            counts = good.sum(), bad.sum()
            sums = torch.stack([*figures, *counts, self._kl * sum(counts)])
        return Losses(losses.sum(dim=1), sums, losses if step is None else None)
