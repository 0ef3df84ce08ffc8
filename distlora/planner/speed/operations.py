"""Count the operations of a training step from the weights that a token goes through. Imports no torch.

distlora.training.flops reads the weights from a model that runs, the planner (speed/compute.py) from config.json.

A weight takes 2 operations a token in forward, 2 for the gradient of its input and 2 for its own where it is trained.
A pair of a query and a key takes 4 a column of the queries in forward (score, output) and 8 in backward (gradients of
weights, values, queries, keys).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PRODUCT = 2
"""Operations a weight and token of one product: forward, the gradient of the input, or that of the weight."""
PAIR_FORWARD, PAIR_BACKWARD = 4, 8
"""Operations a pair and column of the queries, whatever the number of keys' heads."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """A training step's operations, forward and backward."""

    per_token: int
    """In the linears, the adapters and the head."""
    per_pair: tuple[tuple[int, int | None], ...]
    """(operations a query-key pair, window) of each kind of attention layer, all its layers together."""

    def of(self, position_ids: Tensor) -> int:
        """position_ids (B, T), restarting with each document -> operations of these tokens.

        A token at position p attends to p + 1 tokens, or to as many as its window has: causal attention within
        documents, nothing counted twice.
        """
        total = self.per_token * position_ids.numel()
        for operations, window in self.per_pair:
            pairs = position_ids + 1 if window is None else (position_ids + 1).clamp(max=window)
            total += operations * int(pairs.sum())
        return total

    def of_documents(self, lengths: Iterable[int]) -> int:
        """Return the operations of documents with these numbers of tokens."""
        return sum(
            self.per_token * length + sum(each * pairs(length, window) for each, window in self.per_pair)
            for length in lengths
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveWeights:
    """Numbers of weights that a token goes through in a model."""

    linears: int
    """Weights of the blocks' linears, and of the experts that a token chooses. Routers are not counted."""
    linears_are_trained: bool
    adapters: int
    """R (I + O) of each adapter of rank R on a linear of I columns and O rows; of experts, those that a token chooses.
    """
    head: int
    head_is_trained: bool
    head_rows: int
    """Numbers of the head's rows that are trained while the rest is frozen."""
    queries: tuple[tuple[int, int | None], ...]
    """(columns of the queries, window) of each kind of attention layer, all its layers together."""

    def model_flops(self, *, with_reference: bool = False) -> ModelFlops:
        """Return the operations. `with_reference`: every sequence runs forward once more without adapter (DPO)."""
        again = PRODUCT if with_reference else 0
        per_token = (2 * PRODUCT + again + (PRODUCT if self.linears_are_trained else 0)) * self.linears
        per_token += (2 * PRODUCT + again + (PRODUCT if self.head_is_trained else 0)) * self.head
        per_token += 3 * PRODUCT * (self.adapters + self.head_rows)
        per_pair = PAIR_FORWARD + PAIR_BACKWARD + (PAIR_FORWARD if with_reference else 0)
        return ModelFlops(per_token, tuple((per_pair * columns, window) for columns, window in self.queries))


def queries_by_window(columns: int, windows: Iterable[int | None]) -> tuple[tuple[int, int | None], ...]:
    """Return `ActiveWeights.queries` of layers with `columns` columns each and these windows, full attention first."""
    layers = list(windows)
    kinds = sorted(set(layers), key=lambda window: (window is not None, window))
    return tuple((columns * layers.count(window), window) for window in kinds)


def pairs(length: int, window: int | None) -> int:
    """Return the query-key pairs of causal attention in a document, with window - 1 tokens before each."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
