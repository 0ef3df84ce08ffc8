"""Count the operations of a training step, from config.json and settings. Imports no torch.

distlora.training.trial counts those of a model that runs by the same `ActiveWeights`; a test compares them. A
weight takes 2 operations per token in forward, 2 for the gradient of its input and 2 for its own if it is
trained. A query-key pair takes 4 per column of the queries in forward and 8 in backward. Beside what MFU counts stands
what is computed more: recomputation, scores made again, and pairs that a dense mask hides. Routers, norms, activation
functions and DoRA (below 1 % of a linear) are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distlora.architecture.spec import Architecture, LayerKind
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.planner import traffic
from distlora.planner.decoder_sizes import (
    Decoder,
    attention_kind,
    pairs,
    pairs_computed,
    ranks_of_blocks,
    scores_again,
)
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


FLOPS = {
    "forward": "forward",  # Of the decoder layers' linears, and of the experts that tokens choose.
    "input_gradients": "gradients of inputs",
    "weight_gradients": "gradients of weights",  # Of all weights, the LM head, or rows of it.
    "adapters": "adapters",
    "attention": "attention",  # Pairs that documents and windows leave.
    "head": "head",
    "reference": "the reference",
    "mismatched": "mismatched answers",  # Policy and reference, forward alone.
    "recomputation": "recomputation",  # By checkpointing, and by a trained LM head.
    "scores": "scores again",  # In attention's backward where they are not kept, and in the forward of tiles.
    "masked": "pairs that a mask hides",
}
"""Categories of operations, in words."""
_NOT_IN_MFU = ("recomputation", "scores", "masked")

SCORES_AGAIN = 2
"""Operations a pair and column by which scores are made again, in place of keeping them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """Operations of one rank in an optimizer step, of all rows that it runs, empty ones among them."""

    by_kind: Mapping[str, int]
    """Operations by category (FLOPS), without empty ones."""
    tokens: int
    """Tokens that the rank runs."""

    @property
    def counted(self) -> int:
        """Operations that MFU counts."""
        return sum(flops for kind, flops in self.by_kind.items() if kind not in _NOT_IN_MFU)

    @property
    def total(self) -> int:
        """Operations that are computed."""
        return sum(self.by_kind.values())

    def as_json(self) -> dict[str, Any]:
        """Return every figure, for programs."""
        return {"operations": dict(self.by_kind), "counted_by_mfu": self.counted, "tokens": self.tokens}


def step_flops(
    work: Workload, model: PlannedModel, *, ranks: int, is_gpu: bool, document: int | None = None
) -> StepFlops:
    """Return the operations of a step. `document`: tokens of each packed document; None: one per sequence."""
    rows = work.train.accumulation(ranks) * work.train.micro_batch
    length = work.sequence_length
    tokens, documents = rows * length, cut(length, document)
    active, mlp = active_weights(work, model), weights_within(work, model, "mlp.")
    seen = rows * sum(columns * pairs(part, window) for columns, window in active.queries for part in documents)
    architecture = model.shapes.architecture
    decoder = Decoder.of(architecture)
    kind = attention_kind(work, architecture, decoder, is_gpu=is_gpu)
    groups = decoder.heads // decoder.key_heads
    every = rows * sum(columns * pairs_computed(kind, documents, window, groups) for columns, window in active.queries)
    reference = work.train.needs.reference
    head = active.head if active.head_is_trained else 0
    with_gradients = (active.linears if active.linears_are_trained else 0) + head + active.head_rows
    # Recomputed in backward: the MLP half by `selective`, a whole layer by `block` and `offload`, but for products that
    # nothing reads, and logits of a trained LM head. MLP tiles change nothing.
    again = {"none": 0, "selective": sum(mlp)}.get(work.train.checkpointing, active.linears + active.adapters) + head
    if work.train.checkpointing != "none":
        again -= _unread(work, model, "mlp." if work.train.checkpointing == "selective" else "")
    attends_again = work.train.checkpointing in ("block", "offload")
    of_forward, of_backward = scores_again(kind)
    mismatched = 2 if work.train.needs.mismatched else 0
    forwards = 1 + attends_again + (1 if reference else 0) + mismatched
    of_pairs = PAIR_FORWARD * forwards + PAIR_BACKWARD
    by_kind: dict[str, int] = {
        "forward": PRODUCT * active.linears * tokens,
        "input_gradients": PRODUCT * active.linears * tokens,
        "weight_gradients": PRODUCT * tokens * with_gradients,
        "adapters": 3 * PRODUCT * active.adapters * tokens,
        "attention": (PAIR_FORWARD + PAIR_BACKWARD) * seen,
        "head": 2 * PRODUCT * (active.head + active.head_rows) * tokens,
        "reference": (PRODUCT * (active.linears + active.head) * tokens + PAIR_FORWARD * seen) if reference else 0,
        "mismatched": mismatched * (PRODUCT * (active.linears + active.head) * tokens + PAIR_FORWARD * seen)
        + mismatched // 2 * PRODUCT * active.adapters * tokens,
        "recomputation": PRODUCT * again * tokens + PAIR_FORWARD * attends_again * seen,
        "scores": SCORES_AGAIN * (forwards * of_forward + of_backward) * every,
        "masked": of_pairs * (every - seen),
    }
    return StepFlops(by_kind={kind: flops for kind, flops in by_kind.items() if flops}, tokens=tokens)


def active_weights(work: Workload, model: PlannedModel) -> ActiveWeights:
    """Return the weights that a token goes through, equal to flops.active_weights of the built model."""
    shapes, adapter = model.shapes, work.adapter
    full = adapter.method == "full"
    linears, adapters = weights_within(work, model, "")
    rows_of = traffic.trained_rows(work, shapes)
    head_rows = len(rows_of.get(EMBEDDING if shapes.ties(adapter) else HEAD, ()))
    labels = work.train.needs.labels
    return ActiveWeights(
        linears=linears,
        linears_are_trained=full,
        adapters=adapters,
        head=0 if labels else shapes.vocabulary * shapes.hidden,
        head_is_trained=full or HEAD in adapter.modules_to_save,
        head_rows=shapes.hidden * (labels or head_rows),
        queries=queries_by_window(shapes.architecture),
    )


def weights_within(work: Workload, model: PlannedModel, part: str) -> tuple[int, int]:
    """Return (weights, R (I + O) of adapters) per token in linears below `part`; of experts, the chosen ones."""
    shapes = model.shapes
    architecture = shapes.architecture

    def chosen(number: int, path: str, kind: LayerKind) -> int:
        experts = kind.experts
        return (
            number if experts is None or path not in experts.paths else number // experts.num_experts * experts.chosen
        )

    weights = sum(
        count * sum(chosen(w.numel, w.path, kind) for w in kind.weights if w.packs and w.path.startswith(part))
        for kind, count in architecture.counted()
    )
    if work.adapter.method == "full":
        return weights, 0
    adapters = sum(
        blocks * each.active * (each.down[1] + each.up[0])
        for adapter in work.adapters
        for each, blocks in shapes.alike(adapter)
        if each.place.startswith(part)
    )
    # Of a pack's tokens each goes through its own trial's, as many through one as through another.
    return weights, adapters // len(work.adapters)


def skips(work: Workload, *, adapted: bool) -> bool:
    """Return True if recomputation leaves out a linear's product that nothing reads but DoRA's magnitude."""
    return not (work.adapter.use_dora and adapted)


def _unread(work: Workload, model: PlannedModel, part: str) -> int:
    """Return the weights, and R O of adapters, per token of the products below `part` that recomputation leaves out."""
    shapes, total = model.shapes, 0
    for kind, ranks in zip(
        map(shapes.architecture.layer, range(shapes.num_layers)), ranks_of_blocks(work, shapes), strict=True
    ):
        for path in (path for path in kind.unread if path.startswith(part)):
            out, features = next(weight.shape for weight in kind.weights if weight.path == f"{path}.weight")
            rank = ranks.rank(path)
            if skips(work, adapted=rank > 0):
                total += out * (features * len(work.adapters) + rank) // len(work.adapters)
    return total


def cut(length: int, document: int | None) -> list[int]:
    """Tokens of each document of a row that is packed with documents of so many; the last has what is left."""
    if document is None or document >= length:
        return [length]
    return [document] * (length // document) + ([length % document] if length % document else [])
