"""Score head: what a reward model has in place of the LM head (extension point 2). Trained, fp32, replicated.

It is the `score` of transformers' AutoModelForSequenceClassification, or with two outputs and a bias that of
AutoModelForTokenClassification: a linear of the last norm's output. It gives the outputs of every token; the objective
picks those that it trains.

Letters: B rows, T tokens per row, H hidden size, K outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import WIDENED_AT_ONCE
from distlora.model.adapters import Replicated, weighted_sum
from distlora.model.distillation import Divergence
from distlora.model.lm_head import LossHead
from distlora.system import randomness

SCORE = "score"
"""Path of the head in transformers' classes of rewards, and the name that PEFT saves it by."""


class RewardHead(Replicated, LossHead):
    """Return the outputs of each token, (B, T, K) fp32, or (B, T) where K is 1, from hidden (B, T, H)."""

    def __init__(self, labels: int, hidden_size: int) -> None:
        weight = torch.empty(labels, hidden_size, dtype=torch.float32, device="meta")
        bias = None if labels == 1 else nn.Parameter(torch.empty(labels, dtype=torch.float32, device="meta"))
        super().__init__(nn.Parameter(weight), bias=bias)

    @property
    def task_type(self) -> str:
        """Return PEFT's name for the class of transformers whose head it is."""
        return "SEQ_CLS" if self.weight.shape[0] == 1 else "TOKEN_CLS"

    @property
    def takes_cross_entropy(self) -> bool:
        """False: there are no logits of tokens."""
        return False

    @torch.no_grad()
    def reset(self, std: float, *, seed: int) -> None:
        """Initialize the weight as transformers does, normal of this std, by (seed, name), and a bias with 0."""
        start = randomness.normal((self.weight.shape[0], self.weight.shape[1]), seed=seed, name=f"{SCORE}.weight")
        self.weight.copy_(start * std)
        if self.bias is not None:
            self.bias.zero_()

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        reference: Tensor | None = None,
        *,
        by_token: bool = False,
        divergence: Divergence | None = None,
    ) -> Tensor:
        """Return the outputs of each token. `labels` are not read."""
        assert reference is divergence is None, "the reference is of logits, and this head has none"
        outputs: Tensor = _Outputs.apply(hidden.flatten(0, 1), self.weight)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*hidden.shape[:2], -1).squeeze(-1)


class _Outputs(torch.autograd.Function):
    """Outputs (N, K) fp32 of hidden (N, H) and weight (K, H) fp32. Saves the hidden states in their own dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.cat([F.linear(part.float(), weight) for part in hidden.split(WIDENED_AT_ONCE)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        for part, out in zip(gradient.split(WIDENED_AT_ONCE), of_hidden.split(WIDENED_AT_ONCE), strict=True):
            out.copy_(part @ weight)
        return of_hidden, weighted_sum(gradient, hidden)
