"""GRPO (arXiv 2402.03300, equation 3; its KL estimate: equation 4), and what later papers changed in it.

DAPO (arXiv 2503.14476, equation 8) and Dr. GRPO (arXiv 2503.20783) average the tokens otherwise, which the weights of
the labels hold (training/rollouts.py). GSPO (arXiv 2507.18071, equations 5 and 7) has one ratio per answer.

Letters: B rows, T tokens per row, D most documents per row, N answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from distlora.config import RolloutConfig, TrainConfig
from distlora.data.loader import MicroBatch
from distlora.model.batch_invariant import batch_invariant
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.training.objectives.objective import Losses, Objective, document_masks, most_documents, run, send, sums_of

STD_FLOOR = 1e-4
"""Constant that is added to a standard deviation before it divides, as in TRL."""


class MismatchError(RuntimeError):
    """Report that training computes other log-probabilities than the sampler reported at the same weights."""


class GRPO(Objective):
    """-min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A) of each sampled token, and beta times a KL estimate.

    w is the ratio of the token's probability (GSPO: of its answer's, to the power of 1 / tokens) to the one that the
    sampler reported, which training never computes again.
    """

    def __init__(self, train: TrainConfig, rollout: RolloutConfig) -> None:
        super().__init__(train, rollout)
        self._beta = train.of_objective("beta")
        self._high = rollout.epsilon if rollout.epsilon_high is None else rollout.epsilon_high

    def losses(self, model: CausalLM, batch: MicroBatch, device: torch.device, step: int | Tensor | None) -> Losses:
        """Compute the losses of the sampled tokens."""
        sent, rollout = send(batch, device), self.rollout
        old, advantages, weights = sent.logps, sent.advantages, sent.weights
        assert old is not None
        assert advantages is not None
        assert weights is not None
        is_label = sent.labels >= 0
        # Before the forward: a copy to the device that is queued after it makes the host wait for its end.
        answers = None
        if rollout.importance_sampling_level == "sequence":
            answers = document_masks(sent.position_ids, most_documents(batch)) & is_label[:, None]  # One per document.
        reference, form = None, LossForm(by_token=True, temperature=rollout.temperature)
        with batch_invariant(model.is_batch_invariant):
            if self.needs.reference:
                losses, reference = run(model, batch, sent, step, replace(form, with_reference=True))
            else:
                losses = run(model, batch, sent, step, form)
        log_ratio = torch.where(is_label, -losses - old, 0.0)
        ratio = (log_ratio if answers is None else mean_by_answer(log_ratio, answers)).exp()
        clipped = ratio.clamp(1 - rollout.epsilon, 1 + self._high)
        tokens = -torch.minimum(ratio * advantages, clipped * advantages)
        kl = torch.zeros_like(tokens)
        if reference is not None:
            drift = torch.where(is_label, losses - reference, 0.0)  # log p_ref - log p.
            kl = drift.exp() - drift - 1
            if rollout.use_bias_correction_kl:
                kl = kl * ratio
            tokens = tokens + self._beta * kl
        with torch.no_grad():
            difference = log_ratio.abs()
            low = (ratio < 1 - rollout.epsilon) & (advantages < 0) & is_label
            high = (ratio > 1 + self._high) & (advantages > 0) & is_label
            sums = torch.stack([figure.sum() for figure in (kl, low.float(), high.float(), difference)])
        # Not a product with zeros: what stands where nothing is sampled may not be finite.
        return Losses(torch.where(is_label, tokens * weights, 0.0).sum(dim=1), sums, maxima=difference.max()[None])

    def check(self, step: int, figures: Mapping[str, float]) -> None:
        """Raise MismatchError if the first step after a rollout computes other log-probabilities than the sampler."""
        mean, bound = figures["rollout/logprob_difference_mean"], self.rollout.most_difference(self.train.dtype)
        if figures["rollout/staleness"] == 0 and not mean <= bound:
            url, allow = self.rollout.url, f"set rollout.max_logprob_difference={2 * mean:.1g}"
            sampler, cure = (
                "the sampler's",
                f"That is an error of distlora for this model; please report it, or {allow}",
            )
            if url is not None:
                sampler = f"those of the server at rollout.url={url}"
                cure = (
                    "Start the server with the base of model.path quantized as in this run, its dtype, and "
                    f"--logprobs-mode processed_logprobs; or {allow}"
                )
            raise MismatchError(
                f"step {step}: training computes log-probabilities that differ from {sampler} by {mean:.2e} nats on "
                f"average (most {figures['rollout/logprob_difference_max']:.2e}), more than rollout."
                f"max_logprob_difference={bound:g}, although the adapter is the same: its ratios would be wrong. {cure}"
            )


def mean_by_answer(values: Tensor, answers: Tensor) -> Tensor:
    """Return at each token (B, T) the mean over its answer (B, D, T)."""
    means = sums_of(values, answers) / answers.sum(dim=-1).clamp(min=1)
    return torch.where(answers, means[:, :, None], 0.0).sum(dim=1)


def advantages_of(totals: np.ndarray, group: int, scale: str) -> np.ndarray:
    """Return (N,) fp32 advantages from the total rewards (N,), NaN for answers that are left out.

    Reward less the mean of the group's, divided as `scale` (rollout.scale_rewards) says. 0 for what is left out.
    """
    groups = totals.reshape(-1, group)
    values = groups - means_of_rows(groups)[:, None]
    if scale == "group":
        values = values / (deviations_of_rows(groups)[:, None] + STD_FLOOR)
    elif scale == "batch":
        values = values / (deviations_of_rows(totals[None]) + STD_FLOOR)
    return np.nan_to_num(values.reshape(-1), nan=0.0).astype(np.float32)


def means_of_rows(rows: np.ndarray) -> np.ndarray:
    """Return the mean of each row's numbers; NaN without any."""
    counts = np.count_nonzero(~np.isnan(rows), axis=1)
    return np.nansum(rows, axis=1) / np.where(counts, counts, np.nan)


def deviations_of_rows(rows: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each row with Bessel's correction; NaN with fewer than two values."""
    counts = np.count_nonzero(~np.isnan(rows), axis=1)
    squares = np.nansum((rows - means_of_rows(rows)[:, None]) ** 2, axis=1)
    return np.sqrt(squares / np.where(counts > 1, counts - 1, np.nan))
