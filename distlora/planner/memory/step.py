"""Calculate the memory of a step on a rank at each moment, by category, beside what it holds. Imports no torch.

In backward the blocks' kept activations go as the gradients of what is trained of the base come, so a block's moment is
that of the last of the blocks whose adapters are alike, the second or the first: in between both change from block to
block by the same bytes. No gradient comes to blocks before the first that is adapted, which keep nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distlora.architecture.shapes import CHECKED_AT_ONCE
from distlora.planner import traffic
from distlora.planner.decoder_sizes import layers_of
from distlora.planner.machine import Machine
from distlora.planner.memory import Kind, Phase
from distlora.planner.memory.activations import Activations, Costs
from distlora.planner.memory.base import MUON_BYTES, BaseSizes, BaseTensor, Gathered, TrainedSizes, unit_bytes
from distlora.planner.memory.gathered import CastCopies, copied_of, gathered_of
from distlora.planner.memory.layer import Operation, Peak
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks that follow each other and are adapted alike."""

    count: int
    costs: Costs
    activations: Activations
    """Activations of a step if all layers were like these."""
    kept: int
    """Bytes of one on the device that are gone when its backward is done; with inputs in host memory others come in
    their place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMemory:
    """A step of a run, as far as its memory goes."""

    work: Workload
    base: BaseSizes
    trained: TrainedSizes
    shards: int
    blocks: Sequence[Blocks]
    """All of them, from the first to the last."""
    gathered: Gathered
    copied: CastCopies
    at_once: int
    """Tokens that a rank runs at once, and"""
    tokens: int
    """keeps at once."""
    micro_batches: int
    """Passes over the model in a step."""
    is_gpu: bool

    @classmethod
    def of(
        cls,
        work: Workload,
        model: PlannedModel,
        machine: Machine,
        base: BaseSizes,
        trained: TrainedSizes,
        resident: int,
    ) -> StepMemory:
        """Build from a workload and what a rank holds."""
        ranks, at_once = machine.ranks, work.tokens_at_once
        shards, tokens = work.shard_degree(ranks), at_once * work.train.slices(ranks)
        return cls(
            work=work,
            base=base,
            trained=trained,
            shards=shards,
            blocks=blocks_of(work, model, machine, at_once=at_once, tokens=tokens),
            gathered=gathered_of(work, base, shards, resident, is_gpu=machine.is_gpu),
            copied=copied_of(work, base, shards),
            at_once=at_once,
            tokens=tokens,
            micro_batches=traffic.passes_of(work, work.train.accumulation(ranks)),
            is_gpu=machine.is_gpu,
        )

    def moments(self) -> dict[Phase, dict[Kind, int]]:
        """Return the bytes at each moment by category."""
        by_moment: dict[Phase, dict[Kind, int]] = {
            "embedding": {
                "gathered": self.gathered.embedding,
                "working": self._boundary + self.copied.embedding + self._noise,
            },
            "embedding_backward": self._embedding_backward(),
            "forward": self._forward(),
            "head": self._head(self.activations.head_forward, self.gathered.head),
            "head_backward": self._head(self.activations.head_backward, self.gathered.head_backward),
            "block": self._block(),
            "update": {
                "gradients": self.trained.sharded_gradient_bytes,
                "working": MUON_BYTES * max(self.trained.matrices, default=0) * (self.work.optim.name == "muon"),
            },
        }
        return {moment: {kind: n for kind, n in kinds.items() if n} for moment, kinds in by_moment.items()}

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that a step makes: the inner columns of an MLP, a chunk's logits."""
        columns = max(blocks.costs.decoder.mlp_columns for blocks in self.blocks)
        logits = min(4, self.costs.logit_bytes_at_peak) * self.costs.chunk(self.at_once)
        return max(self.at_once * self.costs.itemsize * columns, int(logits))

    @property
    def costs(self) -> Costs:
        """Costs that all blocks have in common."""
        return self.blocks[-1].costs

    @property
    def activations(self) -> Activations:
        """Activations of the step, of all layers."""
        return self.blocks[-1].activations

    @property
    def _noise(self) -> int:
        """Return the bytes of NEFTune's random halves, its noise and its sum with the embeddings, the last two fp32."""
        return 0 if self.work.train.neftune_alpha is None else (2 + 4 + 4) * self.tokens * self.costs.decoder.hidden

    @property
    def _first(self) -> int:
        """The place of the first block that a gradient comes to."""
        if self.trained.embeds or self.costs.trains_base:
            return 0
        frozen = itertools.takewhile(lambda blocks: not blocks.costs.is_adapted, self.blocks)
        return sum(blocks.count for blocks in frozen)

    def _kept_from(self, place: int) -> int:
        """Return the kept bytes of the blocks from `place` on, which are freed after their backward."""
        ends = itertools.accumulate(blocks.count for blocks in self.blocks)
        counts = (
            (blocks, min(blocks.count, max(0, end - place))) for blocks, end in zip(self.blocks, ends, strict=True)
        )
        return sum(count * blocks.kept for blocks, count in counts)

    @property
    def _kept(self) -> int:
        """Bytes of kept activations, ids and labels.

        After a frozen embedding the first norm keeps nothing, unless adapters read its output, which is made again.
        """
        mode, last, first = self.work.train.checkpointing, self.blocks[-1], self.blocks[0].costs
        remade = first.remakes and any(linear.rank for linear in first.linears.get("qkv", ()))
        unread = mode in ("none", "selective") and not self.trained.embeds and not remade
        sent = 3 * 8 * self.tokens if self.is_gpu else 0
        alike = int(self.activations.kept) - self.base.layers * last.kept
        differ = sum(blocks.count * (blocks.costs.indices(mode) - last.costs.indices(mode)) for blocks in self.blocks)
        alike += self.tokens * differ + self._kept_from(self._first) + sent
        return alike - (self.tokens * self.costs.norm_keeps if unread else 0)

    @property
    def _boundary(self) -> int:
        """A boundary input of what runs at once."""
        return self.at_once * self.costs.boundary

    def _runs_in(self, costs: Costs) -> Peak:
        """Return the memory of a decoder layer in forward beside its kept activations.

        That is the operation that takes most, with the half's input, its inputs and dequantized weights. Experts hold
        their results to the end. Without recomputation the results are kept, except for the weights.
        """
        work, train, row = self.work, self.work.train, self.work.sequence_length
        # The outputs of slices that were run before this one.
        beside = 2 * self._boundary + (self.tokens - self.at_once) * costs.boundary
        if work.train.checkpointing in ("none", "selective"):
            beside += self.tokens * costs.masks(row)
        tile = min((train.mlp_tile or work.sequence_length) * train.micro_batch, self.at_once)
        attention, mlp = costs.attention_half(self.at_once, row), costs.mlp_half(tile)
        if work.train.checkpointing == "none":
            return _weights([*attention, *mlp], self.at_once).plus(beside)
        of_mlp = max(_running(operation, tile) for operation in mlp)
        if costs.decoder.experts is not None:
            made = tile * sum(operation.keeps + operation.forward for operation in mlp[1:])
            of_mlp = Peak(made).plus(0, max(operation.dense for operation in mlp))
        if work.train.checkpointing == "selective":
            of_attention = _weights(attention, self.at_once)
        else:
            of_attention = max(_running(operation, self.at_once) for operation in attention)
        return max(of_mlp, of_attention).plus(beside)

    def _embedding_backward(self) -> dict[Kind, int]:
        """Return the bytes of a trained embedding's gradient, sent in fp32 after all other gradients."""
        if not any(tensor.trained for tensor in self.base.embedding):
            return {}
        embedding, gathered, gradient = self.base.embedding, 0, _gradients(self.base.embedding)
        if self.shards > 1:
            gathered = unit_bytes((*self.base.rest, *(embedding if self.base.tied else ())), self.shards)
        else:
            # One process casts the gradient of its 16-bit copy to fp32, and adds the LM head's if the matrix is tied
            # (distlora.parallel.fsdp2).
            gradient += self._tied_gradient + (_of_masters(embedding) if self.costs.itemsize < 4 else 0)
        return {
            "gathered": gathered,
            "gradients": self.trained.sharded_gradient_bytes + gradient,
            "communication": _sent(embedding, self.shards),
            "working": 2 * self._boundary,
        }

    def _forward(self) -> dict[Kind, int]:
        """Return the memory of a layer in forward, of the last one, or of copying out a unit."""
        runs = max(self._runs_in(blocks.costs) for blocks in self.blocks)
        # A checksum of gathered weights in the first forward, and with train.verify after each save (integrity.py).
        checks = 8 * CHECKED_AT_ONCE["cuda"] if self.is_gpu and self.shards > 1 else 0
        last: dict[Kind, int] = {
            "kept": self._kept,
            "working": int(runs.bytes) - int(runs.dense) + self.copied.block + checks,
            "scratch": int(runs.dense),
            "gathered": self.gathered.last,
            "gradients": self._waiting(self.base.layers),
        }
        before = last | {"kept": self._kept - self.blocks[-1].kept, "gathered": self.gathered.forward}
        # FSDP2 copies a head of its own out last, behind the last norm.
        states = 0
        if self.base.head and self.work.parallel.backend == "fsdp2":
            states = int(self.tokens * (self.costs.norm_keeps + self.costs.boundary) + self.activations.newest)
        copying = last | {"working": states, "scratch": 0, "gathered": self.gathered.copying}
        return _most(last, before, copying)

    def _head(self, logits: float, gathered: int) -> dict[Kind, int]:
        # The last layer's output where the last norm keeps it as it is, and no fp32 copy of it.
        output = self.tokens * self.costs.boundary if self.costs.norm_keeps_input else 0
        return {
            "kept": self._kept + self.copied.kept + output,
            "logits": int(logits) - output + self.copied.head,
            "gathered": gathered,
            "gradients": self._waiting(self.base.layers),
        }

    def _block(self) -> dict[Kind, int]:
        begin, moments = 0, []
        for blocks in self.blocks:
            end = begin + blocks.count
            places = {begin, min(max(begin, 1), end - 1), end - 1}
            moments += [self._block_at(place, blocks.activations) for place in places if place >= self._first]
            begin = end
        return _most(*moments)

    def _block_at(self, place: int, activations: Activations) -> dict[Kind, int]:
        """Return the memory of the layer at `place` in its backward."""
        head, base, shards = self.base.head, self.base, self.shards
        # This rank's reduced gradients of the last layers, the LM head and the last norm.
        last = place == base.layers - 1
        done = base.total(lambda unit: _rows_of_masters(unit, shards), place + 1)
        summed = 0 if shards == 1 else _rows_of_masters(head, shards) + done
        kept, dequantized = self._kept - self._kept_from(place + 1), int(activations.dequantized)
        return {
            "kept": kept + self.copied.kept,
            "working": int(activations.working) - dequantized + self.copied.block + self._tied_gradient,
            "scratch": dequantized,
            "gathered": self.gathered.block if place > 0 else self.gathered.first,
            "gradients": self._waiting(place + 1, with_head=False) + (summed if self.shards > 1 else 0),
            # The previous reduce-scatter's input, which FSDP2 keeps until the next one.
            "communication": _sent(head if last else base.kinds[base.kind_of_layer[place + 1]], shards),
        }

    @property
    def _tied_gradient(self) -> int:
        """Bytes of a tied LM head's gradient until the embedding's is there: in the run's dtype, alone in fp32."""
        nbytes = _gradients(self.base.embedding) if self.shards > 1 else _of_masters(self.base.embedding)
        return nbytes if self.base.tied else 0

    def _waiting(self, blocks: int, *, with_head: bool = True) -> int:
        """Return the bytes of whole fp32 gradients of earlier micro-batches that FSDP2 reduces after the last one."""
        if self.shards == 1 or self.micro_batches == 1:
            return 0
        units = [self.base.embedding, self.base.rest, *([self.base.head] if with_head else [])]
        return sum(map(_of_masters, units)) + self.base.total(_of_masters, 0, blocks)


def _most(*moments: dict[Kind, int]) -> dict[Kind, int]:
    return max(moments, key=lambda kinds: sum(kinds.values()))


def _running(operation: Operation, tokens: int) -> Peak:
    """Return the memory of an operation's forward if no result of earlier operations is kept."""
    beside = operation.stacks + operation.joins
    return Peak(tokens * (operation.keeps + operation.forward) + beside).plus(0, operation.dense)


def _weights(operations: Sequence[Operation], tokens: int) -> Peak:
    """Return the most of dequantized weights in a forward whose results are kept, less results not made yet."""
    most, behind = 0.0, 0.0
    for operation in reversed(operations):
        most, behind = max(most, operation.dense - behind), behind + tokens * operation.keeps
    return Peak(most, most)


def _gradients(unit: tuple[BaseTensor, ...]) -> int:
    """Whole, in the dtype in which the unit is gathered."""
    return sum(tensor.compute_itemsize * tensor.numel for tensor in unit if tensor.trained)


def _of_masters(unit: tuple[BaseTensor, ...]) -> int:
    """Whole, in fp32."""
    return sum(4 * tensor.numel for tensor in unit if tensor.trained)


def _rows_of_masters(unit: tuple[BaseTensor, ...], shards: int) -> int:
    """Return the bytes of a rank's rows in fp32."""
    return sum(4 * tensor.shard_numel(shards) for tensor in unit if tensor.trained)


def _sent(unit: tuple[BaseTensor, ...], shards: int) -> int:
    """Return the bytes that a reduce-scatter of the unit's gradients reads, in fp32."""
    return 0 if shards == 1 else shards * _rows_of_masters(unit, shards)


def blocks_of(work: Workload, model: PlannedModel, machine: Machine, *, at_once: int, tokens: int) -> list[Blocks]:
    """Return the decoder layers of a run that keeps `tokens` tokens and runs `at_once` of them together."""
    row, mode = work.sequence_length, work.train.checkpointing
    known: dict[int, Costs] = {}
    for layer in (layers := layers_of(work, model.shapes)):
        if id(layer) not in known:
            costs = Costs.of(work, model, machine, layer)
            # Kinds may differ in what memory does not depend on, such as windows.
            known[id(layer)] = next((other for other in known.values() if other == costs), costs)
    alike = [list(group) for _, group in itertools.groupby((known[id(layer)] for layer in layers), key=id)]
    blocks: dict[int, Blocks] = {}
    for costs, *_ in alike:
        if id(costs) not in blocks:
            activations = costs.step(mode, at_once=at_once, kept_tokens=tokens, tile=work.train.mlp_tile, row=row)
            stacked = tokens // at_once * costs.stacked(mode)
            kept = 0 if mode == "offload" else int(tokens * costs.kept(mode, row) + stacked)
            blocks[id(costs)] = Blocks(0, costs, activations, kept)
    return [replace(blocks[id(group[0])], count=len(group)) for group in alike]
