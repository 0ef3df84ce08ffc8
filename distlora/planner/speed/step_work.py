"""Count the kernel launches of one rank in a training step: decoder layers, LM head and update. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distlora.architecture.shapes import Weight
from distlora.planner import traffic
from distlora.planner.decoder_sizes import INPUTS, AdaptedRanks, Decoder, ranks_of_blocks, windows_of
from distlora.planner.kernels import attention_kind, fuses, pairs_computed
from distlora.planner.machine import Machine
from distlora.planner.model import PlannedModel
from distlora.planner.speed.block_work import BlockSizes, BlockWork, HeadSizes, block_work, head_work, update_work
from distlora.planner.speed.compute import active_weights, cut
from distlora.planner.speed.work import FP32, How, Linear, MovedKind, Work
from distlora.planner.workload import Workload
from distlora_kernels.fused_threshold import max_fused_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Kernel launches of one rank in a step."""

    blocks: tuple[BlockWork, ...]
    """Of a micro-batch in each layer; layers that are alike share one object."""
    micro_batches: int
    """Of the step."""
    passes: int
    """How often the step runs the model: once for each micro-batch, or once (train.accumulate=block)."""
    head: tuple[Work, ...]
    """Of a pass: the embedding, the last norm and the head, forward and backward."""
    gathers: tuple[Work, ...]
    """Of one gather of a block: what was gathered is copied to where it is used, fp32 masters into copies to compute
    with, which one process makes too."""
    moved_blocks: int
    """Blocks of which that is true in each pass, forward and backward."""
    update: tuple[Work, ...]

    def __iter__(self) -> Iterator[tuple[Work, int]]:
        """Yield (launch, number of times) of a whole step."""
        layers_of = Counter(map(id, self.blocks))  # By what they are, each would be hashed to its last launch.
        for key, block in {id(block): block for block in self.blocks}.items():
            layers = layers_of[key]
            for work in (*block.forward, *block.backward, *block.reference):
                yield work, layers * self.micro_batches
        for work in self.head:
            yield work, self.passes
        for work in self.gathers:
            yield work, 2 * self.moved_blocks * self.passes
        for work in self.update:
            yield work, 1

    @property
    def moved(self) -> dict[MovedKind, float]:
        """Bytes of device memory, by kind."""
        found: dict[MovedKind, float] = {}
        for work, times in self:
            found[work.kind] = found.get(work.kind, 0.0) + work.nbytes * times
        return found

    @property
    def flops(self) -> float:
        """Operations of a whole step."""
        return sum(work.flops * times for work, times in self)


def step_work(work: Workload, model: PlannedModel, machine: Machine, *, document: int | None = None) -> StepWork:
    """Return the work of a step. `document`: tokens of each packed document; None for one document per sequence."""
    ranks, shards = machine.ranks, work.shard_degree(machine.ranks)
    micro_batches = work.accumulation(ranks)
    passes = traffic.passes_of(work, micro_batches)
    how = how_of(work, model, machine)
    active, decoder = active_weights(work, model), Decoder.of(model.settings, model.shapes.family)
    gathers = _gathers(model, how, shards)
    head = HeadSizes(
        vocabulary=model.shapes.vocabulary,
        hidden=model.shapes.hidden,
        rows=active.head_rows // model.shapes.hidden,
        is_trained=active.head_is_trained,
        capped=decoder.caps_logits,
        gemma=decoder.norms_in_fp32,
    )
    # A pass of all micro-batches joins a block's slices, and its gradients.
    at_once = work.tokens_at_once * work.slices(ranks)
    return StepWork(
        blocks=_blocks(work, model, machine, decoder, how, document),
        micro_batches=micro_batches,
        passes=passes,
        head=tuple(head_work(head, how, m=at_once, reference=work.objective == "dpo")),
        gathers=gathers,
        moved_blocks=traffic.moved_blocks(work, model.shapes) if gathers else 0,
        update=tuple(
            update_work(
                trained_numbers(work, model, ranks),
                work.optimizer,
                clips=work.max_grad_norm > 0,
                backwards=passes,
                trials=len(work.adapters),
            )
        ),
    )


def _gathers(model: PlannedModel, how: How, shards: int) -> tuple[Work, ...]:
    block = model.shapes.block
    nbytes = 0.0
    if shards > 1:
        nbytes += 2 * traffic.block_bytes(block, shards, quantized=how.quantized, itemsize=how.itemsize)
    if how.trains_base and how.itemsize < FP32:
        nbytes += (FP32 + how.itemsize) * sum(weight.numel for weight in block) / shards
    return (Work("gathered", nbytes),) if nbytes else ()


def how_of(work: Workload, model: PlannedModel, machine: Machine) -> How:
    """Return the options of a workload's computation on a machine."""
    family = model.shapes.family
    fused = fuses(work, family, is_gpu=machine.is_gpu, has_liger=machine.has_liger)
    decodes = machine.is_gpu and work.dtype == "bf16"
    return How(
        itemsize=traffic.DTYPE_BYTES[work.dtype],
        quantized=work.quantized,
        few_rows=max_fused_rows(machine.capability) if decodes else 0,
        keeps_dequantized=work.keep_dequantized,
        trains_base=work.adapter.method == "full",
        fused_norms=fused,
        fused=fused and not work.adapter.use_dora,
        is_gpu=machine.is_gpu,
        attention=attention_kind(work, family, Decoder.of(model.settings, family), is_gpu=machine.is_gpu),
    )


def trained_numbers(work: Workload, model: PlannedModel, ranks: int) -> int:
    """Return the parameters that a rank updates: replicated ones whole, sharded ones by its shard."""
    shapes, shards = model.shapes, work.shard_degree(ranks)
    if work.adapter.method == "full":
        return -(-shapes.numel // shards)
    adapters = sum(map(shapes.adapted_numel, work.adapters))
    rows = shapes.hidden * traffic.token_rows(work, shapes)
    return adapters + rows + len(work.adapter.modules_to_save) * -(-shapes.vocabulary * shapes.hidden // shards)


def _blocks(
    work: Workload, model: PlannedModel, machine: Machine, decoder: Decoder, how: How, document: int | None
) -> tuple[BlockWork, ...]:
    length, shapes = work.sequence_length, model.shapes
    rows, tile = work.micro_batch, work.mlp_tile or length
    tiles = [rows * part for part in cut(length, tile)]
    adapters, windows = ranks_of_blocks(work, shapes), windows_of(model.settings, shapes.family)
    found: dict[tuple[int, int | None], BlockWork] = {}
    blocks = []
    for ranks, window in zip(adapters, windows, strict=True):
        key = (id(ranks), window)
        if key not in found:
            seen = pairs_computed(how.attention, cut(length, document), window, decoder.heads // decoder.key_heads)
            found[key] = block_work(
                block_sizes(work, decoder, shapes.block, ranks),
                how,
                m=rows * length,
                pairs=rows * seen,
                checkpointing=work.checkpointing,
                tiles=tiles,
                reference=work.objective == "dpo",
            )
        blocks.append(found[key])
    return tuple(blocks)


def block_sizes(work: Workload, decoder: Decoder, block: Sequence[Weight], ranks: AdaptedRanks) -> BlockSizes:
    """Return the sizes of a decoder layer with these adapter ranks."""
    experts = decoder.experts

    def linear(name: str, weight: Weight) -> Linear:
        *count, out, features = weight.shape
        if count:
            assert experts is not None
            return Linear(out, features, ranks.rank(name), experts.count, experts.chosen)
        return Linear(
            out,
            features,
            ranks.largest(name),
            is_dora=work.adapter.use_dora,
            trials=len(work.adapters),
            stacked=ranks.rank(name),
        )

    packed = {weight.path.removesuffix(".weight").rpartition(".")[2]: weight for weight in block if weight.packs}
    groups = {
        read: tuple(linear(name, weight) for name, weight in packed.items() if name in names)
        for read, names in INPUTS.items()
    }
    return BlockSizes(
        hidden=decoder.hidden,
        queries=decoder.queries,
        keys=decoder.keys,
        heads=decoder.heads,
        attention=(groups["qkv"], groups["o"]),
        mlp=(groups["gate_up"], groups["down"]),
        norms_after=decoder.norms_after,
        head_norms=decoder.head_norms,
        gemma=decoder.norms_in_fp32,
        experts=0 if experts is None else experts.count,
    )
