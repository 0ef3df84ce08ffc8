"""Seam 2: the head is a loss module. It turns hidden states and labels into loss sums per row; whole logits never
exist.

Token losses are independent of each other, so while the head is frozen the gradient of the hidden states is computed in
the forward pass, chunk by chunk, and only scaled in backward: the head's weight is read (and, when sharded, gathered)
once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 2**24
"""fp32 logits that exist at once (64 MiB); the tokens of a chunk are this over the vocabulary, 16 or more."""

IGNORED_LABEL = -100


class LossHead(nn.Module):
    """forward(hidden (B, T, H), labels (B, T)) -> (B,) fp32: the sum of -log p(label) over each row's labels >= 0.

    Without labels, the logits (B, T, vocabulary) fp32 themselves: through forward too, which is what a sharded weight
    is gathered for.
    """

    def __init__(self, weight: nn.Parameter, *, logit_softcap: float | None = None, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        """(vocabulary, H); the embedding's Parameter itself where the two are tied."""
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale

    def forward(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            return self.logits(hidden)
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        tokens_per_chunk = max(16, LOGITS_PER_CHUNK // self.weight.shape[0])
        chunks = list(zip(flat.split(tokens_per_chunk), targets.split(tokens_per_chunk), strict=True))
        if not torch.is_grad_enabled():
            losses = torch.cat([self.token_losses(part, target) for part, target in chunks])
        elif self.weight.requires_grad:
            losses = torch.cat([checkpoint(self.token_losses, *chunk, use_reentrant=False) for chunk in chunks])
        else:
            losses = _FrozenHeadLoss.apply(flat, targets, self, tokens_per_chunk)
        return losses.view(labels.shape).sum(dim=1)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (N, H), labels (N,) -> (N,) fp32 losses, 0 where there is no label."""
        return F.cross_entropy(self.logits(hidden), labels, ignore_index=IGNORED_LABEL, reduction="none")

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., vocabulary) fp32, scaled and capped as the model's config says."""
        logits = F.linear(hidden, self.weight).float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


class _FrozenHeadLoss(torch.autograd.Function):
    """Token losses (N,) of a frozen head; the hidden states' gradient is taken in forward and scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: LossHead, tokens_per_chunk: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        losses = []
        for part, target, out in zip(*(t.split(tokens_per_chunk) for t in (hidden, labels, gradient)), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = head.token_losses(leaf, target)
                out.copy_(torch.autograd.grad(loss.sum(), leaf)[0])
            losses.append(loss.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None
