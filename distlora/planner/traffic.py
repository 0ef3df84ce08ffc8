"""Calculate the bytes that a training step moves between ranks, as its backend counts them. No torch.

Two measures, each of one rank and one optimizer step:

- **carried**: the bytes that the backend counts (`parallel/ranks.py`): an all-gather's result, what every rank puts
  into a reduce-scatter, the buffer of an all-reduce.
- **received**: what of it comes in over this rank's links, by the ring algorithms that NCCL and gloo use for large
  buffers (and no algorithm gets below it): of S bytes over W ranks an all-gather and a reduce-scatter
  (W-1)/W S each, an all-reduce 2 (W-1)/W S.

Both backends shard dim 0, ceil(rows / ranks) rows for each rank, so a gather carries ranks x ceil(rows / ranks) rows.
tests/parallel/test_wire.py compares these numbers with the collectives that torch issues.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from distlora.architecture.shapes import ModelShapes
from distlora.architecture.tokens import HEAD
from distlora.planner.memory.base import base_of, unit_bytes
from distlora.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBytes:
    """Bytes of one rank's collectives in a step."""

    gathered: int
    """Bytes of all-gathers, over the ranks that shard a replica of the base."""
    on_demand: int = 0
    """Bytes of those that gather chosen experts, for which a layer waits."""
    scattered: int = 0
    """Bytes of reduce-scatters, over the same ranks."""
    reduced: int = 0
    """Bytes of all-reduces, over all ranks."""
    reduced_rows: int = 0
    """Bytes of all-reduces of scattered gradients, over the ranks that own the same rows."""
    exchanged: int = 0
    """Bytes of all-to-alls, over the ranks that shard a replica: the rows of this rank's tokens, both ways."""
    shards: int
    """Ranks that shard one replica of the base."""
    world: int
    """All ranks; shards x replicas."""

    @property
    def carried(self) -> int:
        """Bytes that the backend counts."""
        return self.gathered + self.scattered + self.reduced + self.reduced_rows + self.exchanged

    @property
    def received(self) -> int:
        """Bytes received over this rank's links; of exchanged rows, if tokens choose all experts equally often."""
        replicas = self.world // self.shards
        sharded = (self.gathered + self.scattered + self.exchanged) * (self.shards - 1) // self.shards
        rows = 2 * self.reduced_rows * (replicas - 1) // replicas
        return sharded + 2 * self.reduced * (self.world - 1) // self.world + rows

    def into_machine(self, ranks: int) -> int:
        """Return the least bytes that come into a node of `ranks` ranks from other nodes.

        If nodes differ, the node with the most counts. Other nodes' shards of a replica come once for all of its ranks;
        all-reduced buffers are summed within each node before.
        """
        return max(
            self._into(range(first, min(first + ranks, self.world)), ranks) for first in range(0, self.world, ranks)
        )

    def _into(self, machine: range, ranks: int) -> int:
        """Return the least bytes into one node."""
        own = Counter(rank // self.shards for rank in machine)
        sharded = (self.gathered + self.scattered) * sum(self.shards - n for n in own.values()) // self.shards
        sharded += self.exchanged * sum(n * (self.shards - n) for n in own.values()) // self.shards
        machines = -(-self.world // ranks)
        summed = 2 * self.reduced * (machines - 1) // machines
        if self.reduced_rows:
            for place in {rank % self.shards for rank in machine}:
                among = len({rank // ranks for rank in range(place, self.world, self.shards)})
                summed += 2 * self.reduced_rows * (among - 1) // among
        return sharded + summed


def passes_of(work: Workload, accumulation: int) -> int:
    """Return the forward and backward passes of a step."""
    return accumulation if work.train.accumulate == "step" else 1


def gathers_per_pass(work: Workload) -> tuple[int, int]:
    """Return how often a pass gathers each layer, and the embedding, the LM head and the last norm.

    Layers in forward and backward. Mismatched answers run forward once more (ObjectiveNeeds.mismatched).
    """
    return (3, 2) if work.train.needs.mismatched else (2, 1)


def moved_blocks(work: Workload, shapes: ModelShapes) -> int:
    """Return the number of blocks that are gathered in each pass: all but the resident ones (auto counts as none)."""
    return shapes.num_layers - work.resident_layers


def moved_bytes(work: Workload, shapes: ModelShapes, shards: int) -> int:
    """Return the bytes of the layers that are gathered in each pass."""
    first = shapes.num_layers - moved_blocks(work, shapes)
    return base_of(work, shapes).total(lambda unit: unit_bytes(unit, shards), first)


def chosen_share(experts: int, chosen: int, tokens: int, shards: int) -> float:
    """Return the expected share of a layer's bytes that is gathered for so many tokens of all ranks together.

    Tokens choose at random and all experts alike: 1 - (1 - chosen / experts)^tokens of the experts are used, each
    independently of the others. Every rank sends as much as the one with the most of them, so this is the expected
    largest of `shards` binomial counts.
    """
    used, per_rank, below, share = 1 - (1 - chosen / experts) ** tokens, -(-experts // shards), 0.0, 0.0
    for count in range(per_rank):
        below += math.comb(per_rank, count) * used**count * (1 - used) ** (per_rank - count)
        share += (1 - below**shards) / per_rank
    return share


def on_demand_bytes(work: Workload, shapes: ModelShapes, shards: int, accumulation: int) -> int:
    """Return the expected bytes of a step's gathers of chosen experts, and of the choices (parallel.experts)."""
    if work.parallel.experts == "gathered" or shards == 1:
        return 0
    passes, total = passes_of(work, accumulation), 0
    tokens = shards * work.tokens_at_once * accumulation // passes
    needs, gathers = work.train.needs, gathers_per_pass(work)[0] * passes
    forwards = (1 if work.train.checkpointing == "none" else 2) + needs.reference + 2 * needs.mismatched
    base = base_of(work, shapes)
    kinds = Counter(shapes.layer_formats(work.format))
    for unit, ((number, _), count) in zip(base.kinds, kinds.items(), strict=True):
        experts = shapes.architecture.kinds[number].experts
        if experts is not None:
            whole = sum(tensor.gathered(shards) for tensor in unit if tensor.divided)
            share = chosen_share(experts.num_experts, experts.chosen, tokens, shards)
            total += count * gathers * round(share * whole)
            total += count * accumulation * forwards * shards * experts.num_experts
    return total


def exchanged_bytes(work: Workload, shapes: ModelShapes, accumulation: int) -> int:
    """Return the bytes of the rows that a rank's tokens exchange in a step (parallel.expert_degree).

    Each token has a row per chosen expert, sent and given back in forward, in its recomputation, and as gradients in
    backward. Each forward sends the number of rows of each expert first, and the adapters of rows that choose. At the
    most: a first layer whose input needs no gradient sends one less in backward.
    """
    train, itemsize = work.train, work.itemsize
    forwards, total = 1 if train.checkpointing == "none" else 2, 0
    mismatched = int(train.needs.mismatched)
    reference = int(train.needs.reference) + mismatched
    slots = forwards if len(work.adapters) > 1 else 0  # Passes whose rows choose an adapter.
    slots += reference if all(adapter.starts_as_base for adapter in work.adapters) else 0
    forwards += mismatched
    for kind, count in shapes.architecture.counted() if work.expert_degree > 1 else ():
        if kind.experts is not None:
            rows = work.tokens_at_once * kind.experts.chosen
            total += count * 2 * itemsize * shapes.hidden * rows * (forwards + 1 + reference)
            total += count * 8 * (rows * slots + kind.experts.num_experts * (forwards + reference))
    return accumulation * total


def step_traffic(work: Workload, shapes: ModelShapes, *, world: int, accumulation: int) -> StepBytes:
    """Return the traffic of a step: layers gathered twice per pass, the ends once, adapters reduced once.

    Mismatched answers add a forward: they are as many sequences, if each holds one answer, and else about as many.
    What is trained of the base is gathered in train.dtype too, in backward as well where its gradient needs it (an
    embedding's does not), and its gradients are reduce-scattered once in fp32; the norm takes one number more. With
    several replicas of the base this is within each of them, and a rank's rows of those sums are all-reduced between
    replicas; where every rank has the whole base, those gradients are all-reduced like an adapter's. Resident layers
    are not gathered. ZeRO-3 with parallel.prefetch may gather the last layer once a pass: then this is the most. Where
    mismatched answers interrupt the order of several passes, it gathers some layers for nothing: this is the least.
    """
    adapter, shards, base = work.adapter, work.shard_degree(world), base_of(work, shapes)
    full, needs = adapter.method == "full", work.train.needs
    norm, embedding = unit_bytes(base.rest, shards), unit_bytes(base.embedding, shards)
    head = 0 if needs.labels else unit_bytes(base.head or base.embedding, shards)
    head_is_trained = full or HEAD in adapter.modules_to_save
    # FSDP2 keeps a tied matrix from the embedding to the head; ZeRO-3 gathers it for each.
    together = base.tied and work.parallel.backend == "fsdp2"
    ends = norm * (2 if full else 1) + head * (2 if head_is_trained else 1) + (0 if together else embedding)
    on_demand = on_demand_bytes(work, shapes, shards, accumulation)
    of_layers, of_ends = gathers_per_pass(work)
    # FSDP2 keeps the last norm from a forward without gradient to the next forward.
    kept = (of_ends - 1) * norm if work.parallel.backend == "fsdp2" else 0
    gathered = passes_of(work, accumulation) * (of_layers * moved_bytes(work, shapes, shards) + of_ends * ends - kept)
    gathered += on_demand
    scattered = sum(
        4 * count * shards * tensor.shard_numel(shards) for tensor, count in base.counted() if tensor.trained
    )
    scores = sum(map(math.prod, needs.score_shapes(shapes.hidden).values()))
    reduced = 0 if full else 4 * sum(map(shapes.adapted_numel, work.adapters))
    reduced += 4 * (scores + shapes.hidden * token_rows(work, shapes)) + (4 if scattered and shards > 1 else 0)
    rows = scattered // shards if shards < world else 0
    if shards == 1:
        gathered, scattered, reduced, rows = 0, 0, reduced + rows, 0
    if world == 1:
        reduced = 0
    return StepBytes(
        gathered=gathered,
        on_demand=on_demand,
        scattered=scattered,
        reduced=reduced,
        reduced_rows=rows,
        exchanged=exchanged_bytes(work, shapes, accumulation),
        shards=shards,
        world=world,
    )


def token_rows(work: Workload, shapes: ModelShapes) -> int:
    """Return the number of trained token rows."""
    return sum(map(len, work.trained_rows(shapes).values()))
