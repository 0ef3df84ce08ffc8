"""Calculate the time of a step from its launches and the links that it uses. Imports no torch.

A launch takes the longer of its bytes over the memory's rate and its operations over the unit's. A layer in a pass
takes its launches, or the traffic beside it if that is longer: the next layer's gather, the sum of the previous layer's
gradients, its input on its way to the host or back. Without parallel.prefetch the gather comes first. Nothing stands
beside the first gather of a pass, those of the embedding and the LM head, the last bucket of gradients, and the
optimizer. Each second counts for one resource, so that the terms add up to the step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distlora.architecture.spec import LayerKind, Weight
from distlora.planner import traffic
from distlora.planner.decoder_sizes import (
    INPUTS,
    AdaptedRanks,
    Decoder,
    attention_kind,
    formats_by_name,
    fuses,
    pairs_computed,
    ranks_of_blocks,
)
from distlora.planner.flops import active_weights, cut, skips, step_flops
from distlora.planner.machine import Machine
from distlora.planner.memory.device import copied_adapters
from distlora.planner.model import PlannedModel
from distlora.planner.speed.launches import (
    FP32,
    BlockWork,
    Groups,
    KernelLaunch,
    KernelOptions,
    Linear,
    MovedKind,
    block_work,
    head_work,
    update_work,
)
from distlora.planner.speed.rates import (
    WAITS,
    Rates,
    Seconds,
    StepCollectives,
    Term,
    longest,
    plus,
    rates_of,
    seconds_of,
    step_collectives,
    times,
    total,
)
from distlora.planner.workload import Workload
from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from distlora_kernels.fused_threshold import max_fused_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """Kernel launches of one rank in a step."""

    blocks: tuple[BlockWork, ...]
    """Launches of a micro-batch per layer; layers that are alike share one object."""
    micro_batches: int
    """Micro-batches per step."""
    passes: int
    """Runs of the model per step: one per micro-batch, or one (train.accumulate=block)."""
    head: tuple[KernelLaunch, ...]
    """Embedding, last norm and LM head in a pass, forward and backward."""
    head_of_mismatched: tuple[KernelLaunch, ...]
    """The same for mismatched answers, forward alone; empty without them."""
    gathers: tuple[KernelLaunch, ...]
    """Copies after one gather of a layer: to where it is used, and of fp32 masters (one process makes these too)."""
    moved_blocks: int
    """Layers that are gathered in each pass, forward and backward."""
    update: tuple[KernelLaunch, ...]

    def __iter__(self) -> Iterator[tuple[KernelLaunch, int]]:
        """Yield (launch, number of times) of a whole step."""
        layers_of = Counter(map(id, self.blocks))  # By what they are, each would be hashed to its last launch.
        forwards = 2 if self.head_of_mismatched else 1
        for key, block in {id(block): block for block in self.blocks}.items():
            layers = layers_of[key]
            for work in (*forwards * (*block.forward, *block.reference), *block.backward):
                yield work, layers * self.micro_batches
        for work in (*self.head, *self.head_of_mismatched):
            yield work, self.passes
        for work in self.gathers:
            yield work, (1 + forwards) * self.moved_blocks * self.passes
        for work in self.update:
            yield work, 1

    @property
    def moved(self) -> dict[MovedKind, float]:
        """Bytes of device memory, by kind."""
        found: dict[MovedKind, float] = {}
        for work, number in self:
            found[work.kind] = found.get(work.kind, 0.0) + work.nbytes * number
        return found

    @property
    def flops(self) -> float:
        """Operations of a whole step."""
        return sum(work.flops * number for work, number in self)


def step_work(work: Workload, model: PlannedModel, machine: Machine, *, document: int | None = None) -> StepWork:
    """Return the work of a step. `document`: tokens of each packed document; None for one document per sequence."""
    ranks, shards = machine.ranks, work.shard_degree(machine.ranks)
    micro_batches = work.train.accumulation(ranks)
    passes = traffic.passes_of(work, micro_batches)
    how, shapes = kernel_options(work, model, machine), model.shapes
    active, (_, head) = active_weights(work, model), work.token_formats(shapes)
    gathered = 0.0
    if shards > 1:
        moved = traffic.moved_bytes(work, shapes, shards)
        gathers_per_step = traffic.gathers_per_pass(work)[0] * passes
        moved += traffic.on_demand_bytes(work, shapes, shards, micro_batches) // gathers_per_step
        gathered = 2.0 * moved / max(1, traffic.moved_blocks(work, shapes))
    if how.trains_base and how.itemsize < FP32:
        layers = sum(count * kind.numel for kind, count in shapes.architecture.counted())
        gathered += (FP32 + how.itemsize) * layers / shapes.num_layers / shards
    gathers = (KernelLaunch("gathered", gathered),) if gathered else ()
    # Parameters that a rank updates: replicated ones whole, sharded ones by its shard.
    if work.adapter.method == "full":
        updated = -(-shapes.numel // shards)
    else:
        updated = sum(map(shapes.adapted_numel, work.adapters))
        updated += shapes.hidden * (work.train.needs.labels + traffic.token_rows(work, shapes))
        updated += len(work.adapter.modules_to_save) * -(-shapes.vocabulary * shapes.hidden // shards)
    # A pass of all micro-batches joins a block's slices, and its gradients.
    at_once = work.tokens_at_once * work.train.slices(ranks)
    heads = [
        tuple(
            head_work(
                0 if work.train.needs.labels else shapes.vocabulary,
                shapes.hidden,
                how,
                m=at_once,
                trained=active.head_is_trained,
                trained_rows=active.head_rows // shapes.hidden,
                form=shapes.architecture.head_form.kind,
                reference=work.train.needs.reference,
                distills=work.train.needs.distributions,
                stored=0 if head is None else FORMAT_LAYOUTS[head].num_bytes((shapes.vocabulary, shapes.hidden)),
                backward=backward,
            )
        )
        for backward in (True, False)
    ]
    copied, nbytes = copied_adapters(work, model, machine)
    copies = [KernelLaunch("update", (1 + FP32 / how.itemsize) * nbytes, launches=1 + copied)] if copied else []
    return StepWork(
        blocks=blocks_of(work, model, how, document),
        micro_batches=micro_batches,
        passes=passes,
        head=heads[0],
        head_of_mismatched=heads[1] if work.train.needs.mismatched else (),
        gathers=gathers,
        moved_blocks=traffic.moved_blocks(work, shapes) if gathers else 0,
        update=(
            *update_work(
                updated,
                work.optim.name,
                clips=work.optim.max_grad_norm > 0,
                backwards=passes,
                trials=len(work.adapters),
            ),
            *copies,
        ),
    )


def kernel_options(work: Workload, model: PlannedModel, machine: Machine) -> KernelOptions:
    """Return the options of a workload's computation on a machine."""
    architecture = model.shapes.architecture
    decoder = Decoder.of(architecture)
    fused = fuses(work, architecture, is_gpu=machine.is_gpu)
    decodes = machine.is_gpu and work.train.dtype == "bf16"
    return KernelOptions(
        itemsize=traffic.DTYPE_BYTES[work.train.dtype],
        few_rows=max_fused_rows(machine.capability) if decodes else 0,
        extends=decodes and len(work.adapters) == 1 and not (work.adapter.use_dora or work.adapter.lora_dropout),
        copies=copied_adapters(work, model, machine)[0] > 0,
        trains_base=work.adapter.method == "full",
        norms_in_fp32=decoder.norms_in_fp32,
        fused_norms=fused,
        fused=fused and not work.adapter.use_dora,
        is_gpu=machine.is_gpu,
        attention=attention_kind(work, architecture, decoder, is_gpu=machine.is_gpu),
    )


def blocks_of(work: Workload, model: PlannedModel, how: KernelOptions, document: int | None) -> tuple[BlockWork, ...]:
    """Return the work of a micro-batch in each decoder layer. `document`: tokens of each packed document."""
    length, architecture = work.sequence_length, model.shapes.architecture
    rows, tile = work.train.micro_batch, work.train.mlp_tile or length
    tiles = [rows * part for part in cut(length, tile)]
    found: dict[object, BlockWork] = {}
    blocks = []
    layers = zip(model.shapes.layer_formats(work.format), ranks_of_blocks(work, model.shapes), strict=True)
    for index, ((number, formats), ranks) in enumerate(layers):
        key = (id(ranks), number, None if index < work.dense_layers else formats)
        if key not in found:
            kind = architecture.kinds[number]
            named = {} if index < work.dense_layers else formats_by_name(kind, formats)
            decoder = Decoder.of(architecture, kind, expert_degree=work.expert_degree)
            documents = cut(length, document)
            seen = pairs_computed(how.attention, documents, kind.window, decoder.heads // decoder.key_heads)
            found[key] = block_work(
                decoder,
                _groups(work, decoder, kind, ranks, named),
                how,
                m=rows * length,
                pairs=rows * seen,
                checkpointing=work.train.checkpointing,
                tiles=tiles,
                reference=work.train.needs.reference,
            )
        blocks.append(found[key])
    return tuple(blocks)


def _groups(
    work: Workload, decoder: Decoder, kind: LayerKind, ranks: AdaptedRanks, formats: Mapping[str, str]
) -> Groups:
    """Return the linears of a decoder layer with these adapter ranks and formats."""
    experts = decoder.experts

    def linear(name: str, weight: Weight) -> Linear:
        *count, out, features = weight.shape
        if weight.kind == "experts" and experts is not None:
            return Linear(out, features, ranks.rank(name), experts.local, experts.chosen, format=formats.get(name))
        return Linear(
            out * math.prod(count),
            features,
            ranks.largest(name),
            is_dora=work.adapter.use_dora,
            trials=len(work.adapters),
            stacked=ranks.rank(name),
            format=formats.get(name),
            skips=name in kind.unread and skips(work, adapted=ranks.rank(name) > 0),
        )

    shared = "-" if decoder.shared is None else decoder.shared[0]
    packed = {weight.path.removesuffix(".weight"): weight for weight in kind.weights if weight.packs}
    groups = {path: (linear(path, weight),) for path, weight in packed.items()}
    own = {path.rpartition(".")[2]: each for path, (each,) in groups.items() if not path.startswith(f"{shared}.")}
    return groups | {read: tuple(each for name, each in own.items() if name in names) for read, names in INPUTS.items()}


Part = Literal["mismatched", "forward", "backward", "head", "first gathers", "last sum", "update"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Time of one optimizer step, and of the run."""

    by_term: Mapping[Term, float]
    """Seconds by resource (WAITS)."""
    by_part: Mapping[Part, float]
    moved: Mapping[MovedKind, float]
    """Bytes of a rank's device memory that the step reads and writes, by kind."""
    tokens: int
    """Tokens per step of all ranks."""
    ranks: int
    mfu: float
    steps: int | None
    """Steps of the run; None if neither train.max_steps nor plan.tokens is set."""
    price_per_hour: float | None
    """Price of one GPU."""
    assumptions: tuple[str, ...]
    """Assumptions, one sentence each."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.by_term.values())

    @property
    def binds(self) -> Term:
        """The resource that a step waits for most."""
        return max(WAITS, key=lambda term: self.by_term.get(term, 0.0))

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return self.tokens / self.seconds

    @property
    def tokens_per_second_of_a_rank(self) -> float:
        """Tokens per second per rank."""
        return self.tokens_per_second / self.ranks

    @property
    def hours(self) -> float | None:
        """Hours of all steps, without loading, evaluations and saves."""
        return None if self.steps is None else self.steps * self.seconds / 3600

    @property
    def cost(self) -> float | None:
        """Cost of the hours, in the currency of gpu.price_per_hour."""
        if self.hours is None or self.price_per_hour is None:
            return None
        return self.hours * self.price_per_hour * self.ranks

    @property
    def cost_of_a_million_tokens(self) -> float | None:
        """Cost of 1e6 tokens in the same currency; None without a price."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour / 3600 / self.tokens_per_second_of_a_rank * 1e6

    def as_json(self) -> dict[str, Any]:
        """Every figure, with what is derived of it."""
        derived = "seconds binds tokens_per_second tokens_per_second_of_a_rank mfu steps hours cost"
        return {
            **{name: getattr(self, name) for name in (*derived.split(), "cost_of_a_million_tokens")},
            "seconds_by_what_they_wait_for": dict(self.by_term),
            "seconds_by_part": dict(self.by_part),
            "bytes_of_device_memory": {kind: round(nbytes) for kind, nbytes in self.moved.items()},
            "assumptions": list(self.assumptions),
        }


def step_time(
    work: Workload, model: PlannedModel, machine: Machine, *, document: int | None = None, rates: Rates | None = None
) -> StepTime | None:
    """Return the time of a step; None if a rate is unknown (`rates_of`).

    `document`: tokens of each packed document; None for one document per sequence. `rates`: rates to use in place of
    the node's.
    """
    rates = rates or rates_of(work, machine)
    if rates is None:
        return None
    done = step_work(work, model, machine, document=document)
    collectives = step_collectives(work, model, machine)
    parts = _parts(done, collectives, rates, prefetch=work.parallel.prefetch)
    by_term = plus(*parts.values())
    flops = step_flops(work, model, ranks=machine.ranks, is_gpu=machine.is_gpu, document=document)
    seconds = total(by_term)
    # Rows that are missing are run as empty ones, and count for nothing.
    rows = work.train.global_batch / (machine.ranks * work.train.accumulation(machine.ranks) * work.train.micro_batch)
    tokens = work.train.global_batch * work.sequence_length
    return StepTime(
        by_term=by_term,
        by_part={name: total(part) for name, part in parts.items()},
        moved=done.moved,
        tokens=tokens,
        ranks=machine.ranks,
        mfu=flops.counted * rows / seconds / rates.peak,
        steps=work.steps,
        price_per_hour=machine.price_per_hour,
        assumptions=(*rates.assumptions, *_assumptions(work, machine, document)),
    )


def _parts(work: StepWork, collectives: StepCollectives, rates: Rates, *, prefetch: bool) -> dict[Part, Seconds]:
    """Return the seconds of a step by part."""
    together, resident = work.micro_batches // work.passes, len(work.blocks) - work.moved_blocks
    copies = seconds_of_launches(work.gathers, rates)
    known: dict[tuple[int, bool], tuple[_Stage, _Stage]] = {}
    forward: list[_Stage] = []
    backward: list[_Stage] = []
    for index, block in enumerate(work.blocks):
        key = (id(block), index >= resident)
        if key not in known:
            directions = ((*block.forward, *block.reference), block.backward)
            own, again = (times(seconds_of_launches(launches, rates), together) for launches in directions)
            copied = copies if key[1] else {}
            known[key] = _Stage(plus(own, copied), key[1]), _Stage(plus(again, copied), key[1])
        forward.append(known[key][0])
        backward.append(known[key][1])
    backward.reverse()
    # Nothing else of the layer can run while its rows are exchanged.
    exchanges = [times(each.seconds(rates), work.micro_batches) for each in collectives.exchanges]
    chain = _Chain(collectives.gather.seconds(rates), collectives.boundary.seconds(rates), prefetch)
    # Gradients are summed while the last backward goes on, on the wire that gathers take.
    summed = times(seconds_of(collectives.sums, rates), 1 / len(backward))
    backwards = (times(chain.seconds(backward), work.passes - 1), chain.seconds(backward, beside=summed))
    first = [chain.first(forward), chain.first(backward), collectives.ends.seconds(rates)]
    of_forward = plus(times(chain.seconds(forward), work.passes), exchanges[0])
    mismatched: dict[Part, Seconds] = {}
    if work.head_of_mismatched:
        first += [first[0], first[2]]
        mismatched["mismatched"] = plus(
            of_forward, times(seconds_of_launches(work.head_of_mismatched, rates), work.passes)
        )
    return mismatched | {
        "forward": of_forward,
        "backward": plus(*backwards, exchanges[1]),
        "head": times(seconds_of_launches(work.head, rates), work.passes),
        "first gathers": times(plus(*first), work.passes),
        "last sum": seconds_of(collectives.last, rates),
        "update": seconds_of_launches(work.update, rates),
    }


class _Stage(NamedTuple):
    """A block in a pass; those that are alike are one object."""

    device: Seconds
    moves: bool
    """True if the layer is gathered for this stage."""


class _Chain(NamedTuple):
    """The sequence of decoder layers in a pass."""

    gather: Seconds
    boundary: Seconds
    prefetch: bool

    def seconds(self, stages: Sequence[_Stage], *, beside: Seconds | None = None) -> Seconds:
        """Return the seconds of all layers, without the first gather if it is ahead.

        `beside`: further traffic of each layer.
        """
        following = [*(stage.moves for stage in stages[1:]), False]
        alike = Counter(zip(map(id, stages), following, strict=True))
        known, parts = {id(stage): stage for stage in stages}, []
        for (key, next_moves), number in alike.items():
            stage = known[key]
            ahead = self.gather if self.prefetch and next_moves else {}
            here = {} if self.prefetch or not stage.moves else self.gather
            parts.append(times(plus(longest(stage.device, plus(ahead, beside or {}), self.boundary), here), number))
        return plus(*parts)

    def first(self, stages: Sequence[_Stage]) -> Seconds:
        return self.gather if self.prefetch and stages[0].moves else {}


def seconds_of_launches(launches: Iterable[KernelLaunch], rates: Rates) -> Seconds:
    """Return the seconds of launches one after the other; each by what it waits for."""
    found: Seconds = {"compute": 0.0, "memory": 0.0, "launches": 0.0}
    units = {"matrices": rates.matrices, "attention": rates.attention, "decoding": rates.decoding}
    for work in launches:
        moving, computing = work.nbytes / rates.bandwidth, (work.flops + work.padding) / units[work.unit]
        found["compute" if computing > moving else "memory"] += max(computing, moving)
        found["launches"] += work.launches * rates.launch
    return found


def _assumptions(work: Workload, machine: Machine, document: int | None) -> list[str]:
    """Return the assumptions on the run, beside the rates."""
    length = work.sequence_length
    documents = f"each sequence is one document of {length:,} tokens"
    if document is not None and document < length:
        documents = f"sequences of {length:,} tokens hold documents of {document:,}"
    assumptions = [documents]
    if machine.is_gpu and work.train.deterministic_attention:
        assumptions.append("deterministic attention gradients cost no extra time")
    if work.parallel.resident_blocks == "auto" and machine.ranks > 1:
        assumptions.append("no layer is resident: the number is chosen after the first step")
    if work.parallel.experts == "on_demand" and machine.ranks > 1:
        assumptions.append(
            "tokens choose experts at random, all equally often, and each layer waits for its chosen ones"
        )
    if work.train.needs.mismatched:
        assumptions.append("mismatched prompts and answers fill as many sequences as the step's own")
    if work.train.needs.data == "prompts":
        assumptions.append(
            "each prompt with its answer fills a sequence; shorter ones share one, so a step takes at most this time"
        )
    if work.expert_degree > 1:
        assumptions.append("tokens choose all experts equally often; of uneven loads the busiest rank sets the pace")
    if work.adapter.use_dora and not machine.is_gpu:
        assumptions.append("DoRA's magnitudes are folded into packed weights, as on a GPU")
    assumptions.append("loading, evaluations, samples and saves are not counted, and the CPU never delays the GPU")
    return assumptions
