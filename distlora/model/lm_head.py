"""LM head as a loss module (extension point 2): hidden states and labels in, loss sums per row out.

Whole logits never exist. Token losses are independent of each other, so with a frozen head the gradient of the hidden
states is computed in forward, chunk by chunk, and only scaled in backward: the head's weight is read (and, when
sharded, gathered) once. Trained token rows, columns of the logits, get their gradient in backward, from what forward
kept. A trained head recomputes its logits in backward, chunk by chunk, and accumulates its gradient in fp32; so does a
frozen one with adapters, of which each row chooses one as in the linears.

Where the logits are a frozen weight's product alone, their loss and gradient are computed in place, in memory that all
chunks of a call share. It is free between calls: the peak of a step is often in a decoder layer's backward.

A reward model has a score head instead, trained, in fp32 and replicated: the `score` of transformers'
AutoModelForSequenceClassification, or with two outputs and a bias that of AutoModelForTokenClassification, a linear of
the last norm's output. It gives the outputs of every token; the objective picks those that it trains.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import (
    ADDED_AT_ONCE,
    GRADIENT_PARTS,
    WIDENED_AT_ONCE,
    logit_bytes,
    tokens_per_chunk,
)
from distlora.model.adapters import LoRAPair, Replicated, TokenRows, weighted_sum
from distlora.model.distillation import DistilledLoss, Divergence
from distlora.model.frozen_linear import TokenMatrix, TokenProduct
from distlora.model.head_adapters import AdaptedHeadLoss, LowRank, segments_of
from distlora.model.own_forward import OwnForward
from distlora.system import randomness
from distlora_kernels.products import linear, product

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class LossForm:
    """Form in which a forward returns its rows' losses; by default their sums (B,)."""

    by_token: bool = False
    """Each token's loss, (B, T), without the router loss."""
    with_reference: bool = False
    """Run the rows a second time through the initial model (`keep_start`, or without any adapter), without gradient and
    dropout, while each layer is gathered; each token's loss in both, (2, B, T)."""
    divergence: Divergence | None = None
    """With a reference: each token's loss by it, and the divergence from the initial model, (2, B, T)."""
    temperature: float = 1.0
    """Divides the logits, which must be a product (`head.is_product`)."""


SUMS = LossForm()


class LossHead(nn.Module):
    """Return (B,) fp32 sums of -log p(label) over each row's labels >= 0, from hidden (B, T, H), labels (B, T).

    With `reference` (B, T, H), hidden states of the same rows in another model: return the losses of each token in
    both, (2, B, T) fp32, the second without gradient. One forward serves both, because a sharded weight is gathered per
    forward. `divergence`: return each token's loss by it with `reference` as the teacher, and the divergence, the same
    way. `by_token`: return each token's loss, (B, T). Without labels: return the logits (B, T, vocabulary) fp32.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        bias: nn.Parameter | None = None,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        own: OwnForward | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        """(vocabulary, H); the embedding's Parameter if the two are tied. Empty if `kept` holds the weight."""
        self.matrix: TokenMatrix | None = None
        """The weight in the checkpoint's low-bit format."""
        self._shared: tuple[TokenMatrix, ...] = ()
        self.bias = bias
        """(vocabulary,), frozen."""
        self.own = own
        """The model's own forward, where logits are more than a product, a scale and a cap."""
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale
        # In a tuple, which hides them from nn.Module: the model owns them, and the embedding may share them.
        self._token_rows: tuple[TokenRows, ...] = ()
        self.adapters = nn.ModuleDict()
        """LoRAPair by adapter name, of trials that share the base."""
        self.rows: Tensor | None = None
        """(B,) int64: slot of each row's adapter, -1 for none; the model sets it before each forward."""
        self._reader: Callable[[Tensor], None] | None = None
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] | None = None
        """(logits (N, vocabulary), labels (N,)) -> (N,) fp32 losses, overwriting the logits with their gradient. Used
        instead of torch's if the head is frozen and these are its logits (takes_cross_entropy)."""

    @property
    def takes_cross_entropy(self) -> bool:
        """True if the logits are the product with the frozen weight, and a bias, and nothing else."""
        plain = self.logit_softcap is None and self.logit_scale == 1.0 and not self._token_rows
        return plain and self.own is None and not self.weight.requires_grad

    @property
    def is_product(self) -> bool:
        """True if the logits are linear in the hidden states."""
        return self.logit_softcap is None and self.bias is None and self.own is None

    @property
    def kept(self) -> TokenMatrix | None:
        """The weight in the checkpoint's low-bit format, the embedding's if the two are tied; None if it is dense."""
        return self._shared[0] if self._shared else self.matrix

    def hold(self, matrix: TokenMatrix, *, shared: bool) -> None:
        """Use a low-bit matrix instead of the weight from now on. `shared`: it is the embedding's."""
        self._shared, self.matrix = ((matrix,), None) if shared else ((), matrix)
        del self.weight
        empty = torch.empty(0, matrix.shape[1], dtype=matrix.dtype, device="meta")
        self.register_buffer("weight", empty, persistent=False)

    @property
    def num_rows(self) -> int:
        """Number of tokens, the rows of the weight; call it where a sharded weight is gathered."""
        return self.weight.shape[0] if self.kept is None else self.kept.shape[0]

    @contextlib.contextmanager
    def read_by(self, reader: Callable[[Tensor], None]) -> Iterator[None]:
        """Give `reader` the hidden states (B, T, H) instead of computing losses, while the weight is gathered.

        Forward then returns zeros.
        """
        self._reader = reader
        try:
            yield
        finally:
            self._reader = None

    @property
    def token_rows(self) -> TokenRows | None:
        """Rows of the weight that are trained while the rest is frozen."""
        return self._token_rows[0] if self._token_rows else None

    def train_rows(self, token_rows: TokenRows) -> None:
        """Use these rows instead of the weight's from now on."""
        self._token_rows = (token_rows,)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        reference: Tensor | None = None,
        *,
        by_token: bool = False,
        divergence: Divergence | None = None,
    ) -> Tensor:
        """Return the loss of each row (B,), or of each token (B, T) with `by_token`; without labels the logits."""
        if self._reader is not None:
            self._reader(hidden)
            return hidden.new_zeros(hidden.shape[:2] if by_token else hidden.shape[:1], dtype=torch.float32)
        if labels is None:
            return self.adapted_logits(hidden)
        if divergence is not None:
            assert reference is not None, "a divergence is from a teacher"
            return self._distilled(hidden, reference, labels, divergence)
        losses = self._losses(hidden, labels)
        if reference is None:
            return losses if by_token else losses.sum(dim=1)
        with torch.no_grad():
            reference_losses = self._losses(reference, labels)
        return torch.stack([losses, reference_losses])

    def _distilled(self, hidden: Tensor, teacher: Tensor, labels: Tensor, divergence: Divergence) -> Tensor:
        """Return (2, B, T) fp32 losses and divergences of each token, 0 without a label."""
        assert not self.weight.requires_grad, "a teacher under another LM head"
        states = (hidden.flatten(0, 1), teacher.flatten(0, 1))
        tokens = self._tokens_per_chunk(hidden, distills=True)
        outputs = DistilledLoss.apply(
            *states, labels.flatten(), self.logits, divergence, tokens, torch.is_grad_enabled()
        )
        return torch.stack(outputs).view(2, *labels.shape)

    def _is_plain(self, hidden: Tensor) -> bool:
        return self.takes_cross_entropy and not self.adapters and self.weight.dtype == hidden.dtype

    def _tokens_per_chunk(self, hidden: Tensor, *, distills: bool = False) -> int:
        """Return the number of tokens whose logits exist at once."""
        nbytes = logit_bytes(
            hidden.dtype.itemsize,
            plain=self._is_plain(hidden),
            compiled=self.cross_entropy is not None,
            capped=self.logit_softcap is not None,
            distills=distills,
        )
        return tokens_per_chunk(self.num_rows, nbytes, on_cpu=hidden.device.type == "cpu")

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return (B, T) fp32 losses of each token, 0 without a label."""
        flat, targets, tokens = hidden.flatten(0, 1), labels.flatten(), self._tokens_per_chunk(hidden)
        if self.adapters:
            # Of every row, and on every rank: backward gathers a sharded weight.
            factors = [factor for pair in self.pairs for factor in (pair.A, pair.B)]
            segments = segments_of(self.rows, self.pairs, hidden.shape[1])
            losses = AdaptedHeadLoss.apply(flat, targets, self, tokens, segments, *factors)
        elif self._is_plain(hidden):
            losses = _PlainLoss.apply(flat, targets, self, tokens, torch.is_grad_enabled())
        elif not torch.is_grad_enabled():
            chunks = zip(flat.split(tokens), targets.split(tokens), strict=True)
            losses = torch.cat([self.token_losses(states, target) for states, target in chunks])
        elif self.weight.requires_grad:
            losses = _TrainedHeadLoss.apply(flat, targets, self.weight, self, tokens)
        else:
            rows = None if self.token_rows is None else self.token_rows.rows
            losses = _FrozenHeadLoss.apply(flat, targets, rows, self, tokens)
        return losses.view(labels.shape)

    def token_losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        products: list[tuple[Tensor, Tensor]] | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return (N,) fp32 losses, 0 without a label, from hidden (N, H) and labels (N,). The rest as in `logits`."""
        logits = self.logits(hidden, weight, products, low_rank)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")

    def copied(self) -> LossHead:
        """Return an unsharded copy of this head. If the weight is sharded, call it within forward only."""
        dense = self.weight.detach().clone() if self.kept is None else self.kept.stored.dense(self.kept.dtype)
        weight = nn.Parameter(dense, requires_grad=False)
        head = LossHead(
            weight,
            bias=copy.deepcopy(self.bias),
            logit_softcap=self.logit_softcap,
            logit_scale=self.logit_scale,
            own=copy.deepcopy(self.own),
        )
        if (rows := self.token_rows) is not None:
            token_rows = TokenRows(rows.ids, weight.shape[1])
            token_rows.rows = nn.Parameter(rows.rows.detach().clone(), requires_grad=False)
            head.train_rows(token_rows)
        return head

    @property
    def pairs(self) -> list[LoRAPair]:
        """Return the adapters."""
        return [pair for pair in self.adapters.values() if isinstance(pair, LoRAPair)]

    def adapted_logits(self, hidden: Tensor) -> Tensor:
        """Return `logits` of rows (B, ..., H) that choose adapters."""
        if not self.adapters:
            return self.logits(hidden)
        pairs = self.pairs
        low_ranks = {number: LowRank(pair.A, pair.B, pair.scaling) for number, pair in enumerate(pairs)}
        parts = [
            self.logits(hidden[rows], low_rank=None if number is None else low_ranks[number])
            for rows, number in segments_of(self.rows, pairs, 1)
        ]
        return torch.cat(parts)

    def logits(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        products: list[tuple[Tensor, Tensor]] | None = None,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """Return (..., vocabulary) fp32 from (..., H), with what the model does before and after the product.

        `weight` (vocabulary, H): used instead of the head's. `products` receives, with trained rows, the input of the
        product (..., H) and its columns of the trained rows (..., N). `low_rank`: the adapter of all rows.
        """

        def of_head(inputs: Tensor) -> Tensor:
            plain = of_base(inputs)
            if low_rank is None:
                return plain
            inner = linear(inputs, low_rank.A.to(inputs.dtype))
            return plain + low_rank.scale * linear(inner, low_rank.B.to(inputs.dtype)).float()

        def of_base(inputs: Tensor) -> Tensor:
            matrix = self.weight if weight is None else weight  # In fp32 where the model keeps it so.
            inputs = inputs.to(matrix.dtype)
            if self.kept is not None:
                flat: Tensor = TokenProduct.apply(inputs.flatten(0, -2), self.kept)
                plain = flat.view(*inputs.shape[:-1], -1)
                return (plain if self.bias is None else plain + self.bias).float()
            logits = linear(inputs, matrix, self.bias).float()
            if (rows := self.token_rows) is None:
                return logits
            columns = rows.columns(inputs)
            if products is not None:
                products.append((inputs, columns))
            if self.bias is not None:
                columns = columns + self.bias[list(rows.ids)].float()
            return rows.replace_columns(logits, columns)

        if self.own is not None:
            own: Tensor = self.own(hidden if hidden.dim() > 2 else hidden[None], of_head).float()
            return own if hidden.dim() > 2 else own[0]
        logits = of_head(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


class _PlainLoss(torch.autograd.Function):
    """Token losses (N,) fp32 of a head that takes_cross_entropy, one chunk after the other in the same memory.

    The hidden states' gradient is computed in forward, if it is `wanted`, and scaled in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: LossHead, tokens_per_chunk: int, wanted: bool
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if wanted else None
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        weight, matrix, shape = head.weight, head.kept, (min(len(hidden), tokens_per_chunk), head.num_rows)
        all_logits = hidden.new_empty(shape)
        widens = head.cross_entropy is None and hidden.dtype != torch.float32
        wide = torch.empty(shape if widens else 0, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), tokens_per_chunk):
            chunk = slice(start, start + tokens_per_chunk)
            states, targets = hidden[chunk], labels[chunk]
            logits = all_logits[: len(states)]
            if matrix is not None:
                matrix.multiply(states, logits)
                if head.bias is not None:
                    logits += head.bias
            else:
                product(states, weight.T, add=head.bias, out=logits)
            if head.cross_entropy is not None:
                losses[chunk] = head.cross_entropy(logits, targets)
            else:
                in_fp32 = wide[: len(states)].copy_(logits) if widens else logits
                losses[chunk] = _log_softmax_(in_fp32, targets)
                if gradient is not None:
                    _gradient_of_logits(in_fp32, targets, out=logits)
                del in_fp32
            if chunk.stop >= len(hidden):
                del wide  # On a CPU, oneDNN's product has a workspace.
            if gradient is not None and matrix is not None:
                gradient[chunk] = matrix.gradient(logits)
            elif gradient is not None:
                product(logits, weight, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None, None


def _log_softmax_(logits: Tensor, labels: Tensor) -> Tensor:
    """Turn fp32 logits (N, vocabulary) into log probabilities. Return their losses (N,), as F.cross_entropy does."""
    torch._log_softmax(logits, 1, False, out=logits)
    return F.nll_loss(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")


def _gradient_of_logits(log_probabilities: Tensor, labels: Tensor, *, out: Tensor) -> None:
    """Write the gradient of the sum of losses, in the dtype of `out`, which may be the log probabilities (N, V).

    The gradient of the log probabilities, zeros but for the labels, exists for a part of the tokens at a time.
    """
    rows = -(-len(labels) // GRADIENT_PARTS)
    gradient = torch.empty_like(log_probabilities[:rows])
    ones = (labels >= 0).to(gradient.dtype)[:, None]
    for log_chunk, places, values, into in zip(
        *(each.split(rows) for each in (log_probabilities, labels.clamp(min=0)[:, None], ones, out)), strict=True
    ):
        of_part = gradient[: len(log_chunk)].zero_().scatter_(1, places, -values)
        torch.ops.aten._log_softmax_backward_data.out(of_part, log_chunk, 1, torch.float32, out=log_chunk)
        if out is not log_probabilities:
            into.copy_(log_chunk)


class _FrozenHeadLoss(torch.autograd.Function):
    """Token losses (N,) of a frozen head. The hidden states' gradient is computed in forward and scaled in backward.

    For trained rows (`rows` (n, H) fp32, or None) forward keeps the gradient of their logits, (N, n): their gradient, a
    sum over tokens, needs the weight of each token's loss.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, rows: Tensor | None, head: LossHead, tokens_per_chunk: int
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        losses, inputs, column_parts = [], [], []
        for states, target, out in zip(*(t.split(tokens_per_chunk) for t in (hidden, labels, gradient)), strict=True):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                products: list[tuple[Tensor, Tensor]] = []
                loss = head.token_losses(leaf, target, products=products)
                leaf_gradient, *column_gradients = torch.autograd.grad(
                    loss.sum(), [leaf, *(columns for _, columns in products)]
                )
                out.copy_(leaf_gradient)
            if head.own is not None:
                inputs += [of_product.detach().flatten(0, -2) for of_product, _ in products]
            column_parts += [column_gradient.flatten(0, -2) for column_gradient in column_gradients]
            losses.append(loss.detach())
        if rows is None:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(gradient, torch.cat(inputs) if inputs else hidden, torch.cat(column_parts))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *row_tensors = ctx.saved_tensors
        weights = grad_losses[:, None]
        rows = None
        if row_tensors:
            inputs, column_parts = row_tensors
            rows = weighted_sum(column_parts * weights, inputs)
        return (gradient * weights).to(gradient.dtype), None, rows, None, None


class _TrainedHeadLoss(torch.autograd.Function):
    """Token losses (N,) of a trained head. Backward recomputes each chunk, for the gradients of hidden and the weight.

    It saves the weight of the forward: a Parameter that FSDP2 gathers again before backward, or a copy in the compute
    dtype. The weight's gradient is the fp32 sum over chunks, rounded to that dtype once: summing hundreds of chunks in
    bf16 would lose the small ones.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, head: LossHead, tokens_per_chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, labels, weight)
        ctx.head, ctx.tokens_per_chunk = head, tokens_per_chunk
        chunks = zip(hidden.split(tokens_per_chunk), labels.split(tokens_per_chunk), strict=True)
        return torch.cat([head.token_losses(states, target, weight=weight) for states, target in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, weight = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        tensors = (hidden, labels, grad_losses, grad_hidden)
        for states, target, grad, out in zip(*(t.split(ctx.tokens_per_chunk) for t in tensors), strict=True):
            with torch.enable_grad():
                leaves = (states.detach().requires_grad_(), weight.detach().requires_grad_())
                losses = ctx.head.token_losses(leaves[0], target, weight=leaves[1])
            grad_part, grad_chunk = torch.autograd.grad(losses, leaves, grad)
            out.copy_(grad_part)
            rows = max(1, ADDED_AT_ONCE // weight.shape[1])
            for total, more in zip(grad_weight.split(rows), grad_chunk.split(rows), strict=True):
                total += more
            # As large as the weight: free it and its last rows before the next chunk's is made.
            del grad_chunk, more
        return grad_hidden, None, grad_weight.to(weight.dtype), None, None


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
        return torch.cat([F.linear(chunk.float(), weight) for chunk in hidden.split(WIDENED_AT_ONCE)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        for chunk, out in zip(gradient.split(WIDENED_AT_ONCE), of_hidden.split(WIDENED_AT_ONCE), strict=True):
            out.copy_(chunk @ weight)
        return of_hidden, weighted_sum(gradient, hidden)
