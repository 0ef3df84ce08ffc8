"""Loss that compares two next-token distributions, chunk by chunk: whole logits never exist.

The gradient of the student's hidden states is computed in forward and scaled in backward, as in `lm_head.py`.
Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import GRADIENT_PARTS


class Divergence(NamedTuple):
    """Loss of a token: (1 - ratio) of -log p(label), and ratio * temperature^2 of a divergence D(teacher, student).

    With p and q the teacher's and the student's distributions, of logits over temperature, and m = beta p + (1 - beta)
    q, the divergence is beta KL(p || m) + (1 - beta) KL(q || m), the generalized Jensen-Shannon divergence (Agarwal et
    al. 2023, arXiv 2306.13649, equation 1). As in TRL, beta = 0 is KL(p || q) and beta = 1 is KL(q || p). The factor
    temperature^2 keeps the size of its gradient (Hinton et al. 2015, arXiv 1503.02531).
    """

    beta: float
    temperature: float
    ratio: float

    def losses_(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N,) losses and divergences from fp32 logits (N, V) and labels (N,); without a label both are 0.

        Overwrites the teacher's logits with the gradient of the sum of losses by the student's. A part of the tokens is
        computed at a time, so that the intermediate tensors are small.
        """
        rows = -(-len(labels) // GRADIENT_PARTS)
        parts = zip(student.split(rows), teacher.split(rows), labels.split(rows), strict=True)
        losses, divergences = zip(*(self._of_part(*part) for part in parts), strict=True)
        return torch.cat(losses), torch.cat(divergences)

    def _of_part(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        has_label, places = labels >= 0, labels.clamp(min=0)[:, None]
        log_p, log_q = (torch.log_softmax(logits / self.temperature, dim=-1) for logits in (teacher, student))
        q = log_q.exp()
        if self.beta == 0:
            p = log_p.exp()
            divergences, gradient = _expected(p, log_p.sub_(log_q)), q.sub(p)
        else:
            log_m = log_p
            if self.beta < 1:
                log_m = torch.logaddexp(log_q + math.log1p(-self.beta), log_p + math.log(self.beta))
            log_ratios = (log_q - log_m).mul_(1 - self.beta if self.beta < 1 else 1)
            of_student = _expected(q, log_ratios)
            divergences, gradient = of_student, log_ratios.sub_(of_student[:, None]).mul_(q)
            if self.beta < 1:
                divergences = of_student + self.beta * _expected(log_p.exp(), log_p.sub_(log_m))
        if self.temperature != 1:
            log_q = torch.log_softmax(student, dim=-1)
            q = torch.exp(log_q, out=q)
        rest = 1 - self.ratio
        gradient.mul_(self.ratio * self.temperature).add_(q, alpha=rest)
        gradient.scatter_add_(1, places, torch.full_like(places, -rest, dtype=gradient.dtype))
        torch.mul(gradient, has_label[:, None], out=teacher)
        losses = self.ratio * self.temperature**2 * divergences - rest * log_q.gather(1, places)[:, 0]
        return torch.where(has_label, losses, 0.0), torch.where(has_label, divergences, 0.0)


def _expected(probabilities: Tensor, values: Tensor) -> Tensor:
    """Return the sums (N,) of probabilities * values (N, V)."""
    return torch.linalg.vecdot(probabilities, values)


class DistilledLoss(torch.autograd.Function):
    """Losses and divergences (N,) fp32 of hidden states (N, H) of a student and a teacher under one frozen LM head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor,
        labels: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        divergence: Divergence,
        tokens_per_chunk: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses; the gradient too if it is `wanted`. `logits_of`: (N, H) -> (N, V) fp32."""
        gradient = torch.empty_like(hidden) if wanted else None
        results = []
        for start in range(0, len(hidden), tokens_per_chunk):
            chunk = slice(start, start + tokens_per_chunk)
            with torch.set_grad_enabled(wanted):
                leaf = hidden[chunk].detach().requires_grad_(wanted)
                student = logits_of(leaf)
            by_logits = logits_of(teacher[chunk])
            results.append(divergence.losses_(student.detach(), by_logits, labels[chunk]))
            if gradient is not None:
                gradient[chunk] = torch.autograd.grad(student, leaf, by_logits)[0]
            del student, by_logits  # Else they were there beside the next chunk's.
        losses, divergences = map(torch.cat, zip(*results, strict=True))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(divergences)
        return losses, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradient."""
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(gradient.dtype), *[None] * 6
