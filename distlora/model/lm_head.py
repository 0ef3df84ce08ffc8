"""Seam 2: the head is a loss module. It turns hidden states and labels into loss sums per row; whole logits never
exist.

Token losses are independent of each other, so while the head is frozen the gradient of the hidden states is computed in
the forward pass, chunk by chunk, and only scaled in backward: the head's weight is read (and, when sharded, gathered)
once. Trained token rows, columns of the logits, get their gradient in backward, from what forward kept of it.
A trained head computes its logits again in backward, chunk by chunk, and adds up its own gradient in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.model.trainable_tokens import TokenRows, weighted_sum

LOGITS_PER_CHUNK = 2**24
"""fp32 logits that exist at once (64 MiB); the tokens of a chunk are this over the vocabulary, 16 or more."""
LOGITS_PER_CHUNK_ON_CPU = 2**20
"""There what a chunk has at once, five times its logits, stays in the caches; but for no fewer tokens than
FEWEST_ON_CPU, since every chunk reads the whole weight."""
FEWEST_ON_CPU = 128

ADDED_AT_ONCE = 2**22
"""Numbers of a trained head's gradient in bf16 that are added to its sum in fp32 at once: a CPU widens them before."""

IGNORED_LABEL = -100


def tokens_per_chunk(vocabulary: int, *, on_cpu: bool) -> int:
    """Tokens whose logits exist at once."""
    tokens = LOGITS_PER_CHUNK // vocabulary
    if on_cpu:
        tokens = min(tokens, max(FEWEST_ON_CPU, LOGITS_PER_CHUNK_ON_CPU // vocabulary))
    return max(16, tokens)


class LossHead(nn.Module):
    """forward(hidden (B, T, H), labels (B, T)) -> (B,) fp32: the sum of -log p(label) over each row's labels >= 0.

    With `reference` (B, T, H), the hidden states of the same rows in another model: the losses of each token in both,
    (2, B, T) fp32, the second without gradient. One forward for both, since a sharded weight is gathered for one.
    `by_token`: each token's loss, (B, T), in the place of the sums.

    Without labels, the logits (B, T, vocabulary) fp32 themselves: through forward too, which is what a sharded weight
    is gathered for.
    """

    def __init__(self, weight: nn.Parameter, *, logit_softcap: float | None = None, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        """(vocabulary, H); the embedding's Parameter itself where the two are tied."""
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale
        # In a tuple, which hides them from nn.Module: the model owns them, and the embedding may share them.
        self._token_rows: tuple[TokenRows, ...] = ()
        self._reader: Callable[[Tensor], None] | None = None
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] | None = None
        """(logits (N, vocabulary), labels (N,)) -> (N,) fp32 losses, whose gradient it writes over the logits: in the
        place of torch's where the head is frozen and these are its logits (takes_cross_entropy)."""

    @property
    def takes_cross_entropy(self) -> bool:
        """Whether the logits are the product with the frozen weight and nothing else."""
        plain = self.logit_softcap is None and self.logit_scale == 1.0 and not self._token_rows
        return plain and not self.weight.requires_grad

    @contextlib.contextmanager
    def read_by(self, reader: Callable[[Tensor], None]) -> Iterator[None]:
        """Forward gives `reader` the hidden states (B, T, H) in place of computing losses, while the weight is whole:
        a sharded one is gathered for forward alone. What forward then returns is zeros."""
        self._reader = reader
        try:
            yield
        finally:
            self._reader = None

    @property
    def token_rows(self) -> TokenRows | None:
        """The rows of the weight that are trained while the rest is frozen."""
        return self._token_rows[0] if self._token_rows else None

    def train_rows(self, token_rows: TokenRows) -> None:
        """Take these rows in place of the weight's own from now on."""
        self._token_rows = (token_rows,)

    def forward(
        self, hidden: Tensor, labels: Tensor | None, reference: Tensor | None = None, *, by_token: bool = False
    ) -> Tensor:
        if self._reader is not None:
            self._reader(hidden)
            return hidden.new_zeros(hidden.shape[:2] if by_token else hidden.shape[:1], dtype=torch.float32)
        if labels is None:
            return self.logits(hidden)
        losses = self._losses(hidden, labels)
        if reference is None:
            return losses if by_token else losses.sum(dim=1)
        with torch.no_grad():
            of_reference = self._losses(reference, labels)
        return torch.stack([losses, of_reference])

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(B, T) fp32: the loss of each token, 0 where there is no label."""
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        tokens = tokens_per_chunk(self.weight.shape[0], on_cpu=flat.device.type == "cpu")
        if not torch.is_grad_enabled():
            chunks = zip(flat.split(tokens), targets.split(tokens), strict=True)
            losses = torch.cat([self.token_losses(part, target) for part, target in chunks])
        elif self.weight.requires_grad:
            losses = _TrainedHeadLoss.apply(flat, targets, self.weight, self, tokens)
        elif self.cross_entropy is not None and self.takes_cross_entropy:
            losses = _PlainHeadLoss.apply(flat, targets, self, tokens)
        else:
            rows = None if self.token_rows is None else self.token_rows.rows
            losses = _FrozenHeadLoss.apply(flat, targets, rows, self, tokens)
        return losses.view(labels.shape)

    def token_losses(
        self, hidden: Tensor, labels: Tensor, own: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """hidden (N, H), labels (N,) -> (N,) fp32 losses, 0 where there is no label. The rest as in `logits`."""
        logits = self.logits(hidden, own, weight)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")

    def own_columns(self, hidden: Tensor) -> Tensor | None:
        """(..., H) -> (..., trained rows) fp32: their logits, neither scaled nor capped; None where there are none."""
        return None if self.token_rows is None else self.token_rows.columns(hidden)

    def copied(self) -> LossHead:
        """This head as it is now, whole, in memory of its own: where the weight is sharded, within forward alone."""
        weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        head = LossHead(weight, logit_softcap=self.logit_softcap, logit_scale=self.logit_scale)
        if (rows := self.token_rows) is not None:
            own = TokenRows(rows.ids, weight.shape[1])
            own.rows = nn.Parameter(rows.rows.detach().clone(), requires_grad=False)
            head.train_rows(own)
        return head

    def logits(self, hidden: Tensor, own: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """(..., H) -> (..., vocabulary) fp32, scaled and capped as the model's config says. `own`: from own_columns;
        `weight` (vocabulary, H): in the place of the head's own."""
        logits = F.linear(hidden, self.weight if weight is None else weight).float()
        if self.token_rows is not None:
            logits = self.token_rows.replace_columns(logits, self.token_rows.columns(hidden) if own is None else own)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


class _FrozenHeadLoss(torch.autograd.Function):
    """Token losses (N,) of a frozen head; the hidden states' gradient is taken in forward and scaled in backward.

    Of trained rows (`rows` (n, H) fp32, or None) forward keeps the gradient of their logits, (N, n): the sum over
    tokens that is the rows' gradient can be made only when each token's loss has its weight.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, rows: Tensor | None, head: LossHead, tokens_per_chunk: int
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        losses, of_columns = [], []
        for part, target, out in zip(*(t.split(tokens_per_chunk) for t in (hidden, labels, gradient)), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                own = head.own_columns(leaf)
                loss = head.token_losses(leaf, target, own)
                of_leaf, *of_own = torch.autograd.grad(loss.sum(), [leaf] if own is None else [leaf, own])
                out.copy_(of_leaf)
            of_columns += of_own
            losses.append(loss.detach())
        ctx.save_for_backward(gradient, *(() if rows is None else (hidden, torch.cat(of_columns))))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *of_rows = ctx.saved_tensors
        weights = grad_losses[:, None]
        rows = None
        if of_rows:
            hidden, of_columns = of_rows
            rows = weighted_sum(of_columns * weights, hidden)
        return (gradient * weights).to(gradient.dtype), None, rows, None, None


class _PlainHeadLoss(torch.autograd.Function):
    """The same of a head that has a `cross_entropy`: of a chunk there are its logits in the compute dtype, once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: LossHead, tokens_per_chunk: int) -> Tensor:
        assert head.cross_entropy is not None
        gradient, losses = torch.empty_like(hidden), []
        for part, target, out in zip(*(t.split(tokens_per_chunk) for t in (hidden, labels, gradient)), strict=True):
            logits = F.linear(part, head.weight)
            losses.append(head.cross_entropy(logits, target))
            torch.mm(logits, head.weight, out=out)
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None


class _TrainedHeadLoss(torch.autograd.Function):
    """Token losses (N,) of a trained head; backward computes each chunk again, for hidden's gradient and the weight's.

    It saves the weight as it was in forward: a Parameter that FSDP2 gathers again before backward, or a copy in the
    compute dtype. The weight's gradient is the sum over chunks in fp32, rounded to that dtype once: adding up hundreds
    of chunks in bf16 would lose the small ones.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, head: LossHead, tokens_per_chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, labels, weight)
        ctx.head, ctx.tokens_per_chunk = head, tokens_per_chunk
        chunks = zip(hidden.split(tokens_per_chunk), labels.split(tokens_per_chunk), strict=True)
        return torch.cat([head.token_losses(part, target, weight=weight) for part, target in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, weight = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        tensors = (hidden, labels, grad_losses, grad_hidden)
        for part, target, grad, out in zip(*(t.split(ctx.tokens_per_chunk) for t in tensors), strict=True):
            with torch.enable_grad():
                leaves = (part.detach().requires_grad_(), weight.detach().requires_grad_())
                losses = ctx.head.token_losses(leaves[0], target, weight=leaves[1])
            grad_part, grad_chunk = torch.autograd.grad(losses, leaves, grad)
            out.copy_(grad_part)
            rows = max(1, ADDED_AT_ONCE // weight.shape[1])
            for total, more in zip(grad_weight.split(rows), grad_chunk.split(rows), strict=True):
                total += more
            # As large as the weight: gone before there is the next chunk's, with its last rows.
            del grad_chunk, more
        return grad_hidden, None, grad_weight.to(weight.dtype), None, None
