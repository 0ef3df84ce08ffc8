"""Adapters of a frozen LM head: rows choose one each, and backward recomputes their logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora.model.adapters import LoRAPair

if TYPE_CHECKING:
    from distlora.model.lm_head import LossHead


class LowRank(NamedTuple):
    """Adapter of the head for some rows: logits + s (h A^T) B^T."""

    A: Tensor
    """(r, H) fp32."""
    B: Tensor
    """(vocabulary, r) fp32."""
    scale: float


class Segment(NamedTuple):
    """Neighbouring rows with the same adapter."""

    rows: slice
    adapter: int | None
    """Number in `head.adapters`; None: the base alone."""


def segments_of(slots: Tensor | None, pairs: Sequence[LoRAPair], tokens: int) -> list[Segment]:
    """Return the segments of rows of so many tokens each, from their `slots` (B,). The host reads the slots."""
    assert slots is not None, "an LM head with adapters and no row choice: set CausalLM's adapter_rows"
    numbers = {pair.slot: number for number, pair in enumerate(pairs)}
    segments, start = [], 0
    for adapter, rows in itertools.groupby(slots.tolist(), numbers.get):
        stop = start + tokens * len(list(rows))
        segments.append(Segment(slice(start, stop), adapter))
        start = stop
    return segments


class AdaptedHeadLoss(torch.autograd.Function):
    """Token losses (N,) of a frozen head with adapters, whose A and B are `factors`, in turn.

    Backward recomputes each chunk, because the factors' gradient needs the weight of each token's loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: LossHead,
        tokens_per_chunk: int,
        segments: list[Segment],
        *factors: Tensor,
    ) -> Tensor:
        """Return the losses."""
        chunks = [
            (chunk, adapter)
            for rows, adapter in segments
            for chunk in (
                slice(at, min(at + tokens_per_chunk, rows.stop))
                for at in range(rows.start, rows.stop, tokens_per_chunk)
            )
        ]
        ctx.save_for_backward(hidden, labels, *factors)
        ctx.head, ctx.chunks, ctx.scales = head, chunks, [pair.scaling for pair in head.pairs]
        return torch.cat(
            [
                head.token_losses(hidden[chunk], labels[chunk], low_rank=_low_rank(factors, ctx.scales, adapter))
                for chunk, adapter in chunks
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the hidden states (N, H) and of the factors."""
        hidden, labels, *factors = ctx.saved_tensors
        of_hidden, of_factors = torch.empty_like(hidden), [torch.zeros_like(factor) for factor in factors]
        for chunk, adapter in ctx.chunks:
            with torch.enable_grad():
                leaves = [hidden[chunk].detach().requires_grad_()]
                low_rank = _low_rank(factors, ctx.scales, adapter)
                if low_rank is not None:
                    leaves += [factor.detach().requires_grad_() for factor in low_rank[:2]]
                    low_rank = LowRank(leaves[1], leaves[2], low_rank.scale)
                losses = ctx.head.token_losses(leaves[0], labels[chunk], low_rank=low_rank)
            of_hidden[chunk], *grown = torch.autograd.grad(losses, leaves, grad_losses[chunk])
            for number, more in enumerate(grown):
                of_factors[2 * adapter + number] += more
        return of_hidden, None, None, None, None, *of_factors


def _low_rank(factors: Sequence[Tensor], scales: Sequence[float], adapter: int | None) -> LowRank | None:
    return None if adapter is None else LowRank(factors[2 * adapter], factors[2 * adapter + 1], scales[adapter])
