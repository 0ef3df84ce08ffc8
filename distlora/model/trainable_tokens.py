"""Train single rows of an otherwise frozen embedding or LM head: PEFT's trainable tokens.

The rows are replicated fp32 parameters like an adapter's, so FSDP2 ignores them and their gradients are reduced like
adapters'. They replace rows of the frozen matrix: in the embedding after the lookup, in the head as columns of its
logits, so neither needs the matrix in another form.

Letters: N trained rows, H hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TOKENS_PER_PRODUCT = 1024
"""Tokens whose gradients are widened to fp32 at once."""


class TokenRows(nn.Module):
    """Trained rows of one matrix, by ascending token id."""

    def __init__(self, ids: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        assert ids == tuple(sorted(set(ids))), "token ids must ascend"
        self.ids = ids
        self.rows = nn.Parameter(torch.empty(len(ids), hidden_size, dtype=torch.float32, device="meta"))
        """(N, H) fp32 masters, in the order of `ids`."""
        self._ids: Tensor | None = None

    def embed(self, embedding: nn.Module, input_ids: Tensor) -> Tensor:
        """Embed (B, T) int64 -> (B, T, H) in the embedding's dtype, with the trained rows for their tokens.

        An embedding scale (Gemma's) applies to trained rows too. The row of the padding token gets no gradient, as in
        torch.
        """
        scale = getattr(embedding, "embed_scale", None)
        padding = getattr(embedding, "padding_idx", None)
        slots = self._slots(input_ids)
        frozen_slot = self.ids.index(padding) if padding in self.ids else None
        return _ReplaceRows.apply(embedding(input_ids), self.rows, slots, scale, frozen_slot)

    def replace_columns(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Replace the trained tokens' columns of logits (..., V) by `columns` (..., N), both fp32."""
        return logits.index_copy(-1, self._ids_on(logits.device), columns)

    def columns(self, hidden: Tensor) -> Tensor:
        """Return (..., N) fp32 logits of the trained tokens from (..., H), computed in the dtype of `hidden`."""
        return F.linear(hidden, self.rows.to(hidden.dtype)).float()

    def _slots(self, input_ids: Tensor) -> Tensor:
        """Return int64 like input_ids: index of each token's trained row, -1 for none."""
        ids = self._ids_on(input_ids.device)
        slots = torch.searchsorted(ids, input_ids).clamp_(max=len(ids) - 1)
        return torch.where(ids[slots] == input_ids, slots, -1)

    def _ids_on(self, device: torch.device) -> Tensor:
        if self._ids is None or self._ids.device != device:  # Copied to the device once, not in every step.
            self._ids = torch.tensor(self.ids, device=device)
        return self._ids


class _ReplaceRows(torch.autograd.Function):
    """Embedded tokens (B, T, H) with some rows replaced. The frozen embedding has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, embedded: Tensor, rows: Tensor, slots: Tensor, scale: Tensor | None, frozen_slot: int | None
    ) -> Tensor:
        ctx.save_for_backward(slots, scale)
        ctx.num_rows, ctx.frozen_slot = len(rows), frozen_slot
        trained = rows.to(embedded.dtype)
        if scale is not None:
            trained = trained * scale.to(embedded.dtype)
        return torch.where((slots >= 0)[..., None], trained[slots.clamp(min=0)], embedded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slots, scale = ctx.saved_tensors
        # The product with a matrix of zeros and ones sums in a fixed order; index_add does not on a GPU.
        rows = sum_by_slot(gradient.flatten(0, -2), slots.flatten(), ctx.num_rows)
        if scale is not None:
            rows *= scale.to(gradient.dtype).float()
        if ctx.frozen_slot is not None:
            rows[ctx.frozen_slot] = 0
        return None, rows, None, None, None


def sum_by_slot(values: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """Sum values (T, H) by slots (T,) int64, -1 for none -> (num_slots, H) fp32."""
    total = torch.zeros(num_slots, values.shape[1], dtype=torch.float32, device=values.device)
    numbers = torch.arange(num_slots, device=values.device)[:, None]
    for part, part_slots in zip(values.split(TOKENS_PER_PRODUCT), slots.split(TOKENS_PER_PRODUCT), strict=True):
        total.addmm_((numbers == part_slots).float(), part.float())
    return total


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights^T values: weights (T, N) fp32, values (T, H) -> (N, H) fp32."""
    total = torch.zeros(weights.shape[1], values.shape[1], dtype=torch.float32, device=values.device)
    for part, part_values in zip(weights.split(TOKENS_PER_PRODUCT), values.split(TOKENS_PER_PRODUCT), strict=True):
        total.addmm_(part.t(), part_values.float())
    return total
