"""Count the operations of a training step that MFU counts, from config.json and settings. Imports no torch.

distlora.training.trial counts those of a model that runs by the same `ActiveWeights`; a test compares them. A
weight takes 2 operations per token in forward, 2 for the gradient of its input and 2 for its own if it is
trained. A query-key pair takes 4 per column of the queries in forward and 8 in backward. Routers, norms, activation
functions and DoRA (below 1 % of a linear) are left out. What is computed beside that (recomputation, scores made again,
pairs that a dense mask hides) the launches of speed/timing.py tell.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distlora.architecture.spec import Architecture
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.planner.decoder_sizes import pairs
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload

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
    """Operations per token in linears, adapters and LM head."""
    per_pair: tuple[tuple[int, int | None], ...]
    """(operations a query-key pair, window) of each kind of attention layer, all its layers together."""

    def of_document(self, length: int) -> int:
        """Return the operations of a document."""
        return self.per_token * length + sum(ops * pairs(length, window) for ops, window in self.per_pair)

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
    """Numbers of the head's rows that are trained while the rest is frozen, or of a score in place of the head."""
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

    def mismatched_flops(self) -> ModelFlops:
        """Return the operations of a forward, and of a second one without adapter (KTO's estimate of KL)."""
        per_token = PRODUCT * (2 * (self.linears + self.head) + self.adapters + self.head_rows)
        return ModelFlops(per_token, tuple((2 * PAIR_FORWARD * columns, window) for columns, window in self.queries))


def queries_by_window(architecture: Architecture) -> tuple[tuple[int, int | None], ...]:
    """Return `ActiveWeights.queries` of a model's layers with softmax attention, full attention first."""
    columns: Counter[int | None] = Counter()
    for index in range(architecture.num_layers):
        kind = architecture.layer(index)
        if kind.heads is not None:
            heads, _, size = kind.heads
            columns[kind.window] += heads * size
    return tuple((columns[window], window) for window in sorted(columns, key=lambda each: (each is not None, each)))


def counted_flops(work: Workload, model: PlannedModel, *, ranks: int) -> int:
    """Return the operations of a rank's step that MFU counts, of all rows that it runs, empty ones among them."""
    rows = work.train.accumulation(ranks) * work.train.micro_batch
    needs, active = work.train.needs, active_weights(work, model)
    passes = [active.model_flops(with_reference=needs.reference)]
    passes += [active.mismatched_flops()] if needs.mismatched else []
    return rows * sum(each.of_document(work.sequence_length) for each in passes)


def active_weights(work: Workload, model: PlannedModel) -> ActiveWeights:
    """Return the weights that a token goes through, equal to flops.active_weights of the built model."""
    shapes, adapter = model.shapes, work.adapter
    full = adapter.method == "full"
    linears = 0
    for kind, count in shapes.architecture.counted():
        of_experts = () if kind.experts is None else kind.experts.paths
        for weight in (weight for weight in kind.weights if weight.packs):
            number = weight.numel
            if kind.experts is not None and weight.path in of_experts:
                number = number // kind.experts.num_experts * kind.experts.chosen
            linears += count * number
    adapters = sum(
        blocks * each.active * (each.down[1] + each.up[0])
        for trial in work.adapters
        for each, blocks in (() if full else shapes.alike(trial))
    )
    rows_of = work.trained_rows(shapes)
    head_rows = len(rows_of.get(EMBEDDING if shapes.ties(adapter) else HEAD, ()))
    labels = work.train.needs.labels
    return ActiveWeights(
        linears=linears,
        linears_are_trained=full,
        adapters=adapters // len(work.adapters),  # Of a pack's tokens each goes through its own trial's.
        head=0 if labels else shapes.vocabulary * shapes.hidden,
        head_is_trained=full or HEAD in adapter.modules_to_save,
        head_rows=shapes.hidden * (labels or head_rows),
        queries=queries_by_window(shapes.architecture),
    )
