"""Calculate the time of a step from its launches and the links that it uses. Imports no torch.

A launch takes the longer of its bytes over the memory's rate and its operations over the unit's. A layer in a pass
takes its launches, or the traffic beside it if that is longer: the next layer's gather, the sum of the previous layer's
gradients, its input on its way to the host or back. Without parallel.prefetch the gather comes first. Nothing stands
beside the first gather of a pass, those of the embedding and the LM head, the last bucket of gradients, and the
optimizer. Each second counts for one resource, so that the terms add up to the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distlora.planner import traffic
from distlora.planner.decoder_sizes import KernelOptions, copied_adapters, layers_of, pairs_computed
from distlora.planner.flops import active_weights, counted_flops
from distlora.planner.machine import Machine
from distlora.planner.model import PlannedModel
from distlora.planner.speed.launches import (
    FP32,
    BlockWork,
    KernelLaunch,
    MovedKind,
    block_work,
    head_work,
    update_work,
)
from distlora.planner.speed.rates import (
    WAITS,
    DeviceRates,
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

    def __iter__(self) -> Iterator[tuple[str, KernelLaunch, int]]:
        """Yield (pass, launch, number of times) of a whole step."""
        layers_of = Counter(map(id, self.blocks))  # By what they are, each would be hashed to its last launch.
        for key, block in {id(block): block for block in self.blocks}.items():
            times = layers_of[key] * self.micro_batches
            passes = {name: getattr(block, name) for name in ("forward", "recomputation", "backward", "reference")}
            if self.head_of_mismatched:
                passes["mismatched"] = (*block.forward, *block.reference)
            for name, launches in passes.items():
                yield from ((name, launch, times) for launch in launches)
        for name, launches in (("head", self.head), ("mismatched", self.head_of_mismatched)):
            yield from ((name, launch, self.passes) for launch in launches)
        gathers = (3 if self.head_of_mismatched else 2) * self.moved_blocks * self.passes
        yield from (("gathers", launch, gathers) for launch in self.gathers)
        yield from (("update", launch, 1) for launch in self.update)

    @property
    def moved(self) -> dict[MovedKind, float]:
        """Bytes of device memory, by kind."""
        nbytes: dict[MovedKind, float] = {}
        for _, work, number in self:
            nbytes[work.kind] = nbytes.get(work.kind, 0.0) + work.nbytes * number
        return nbytes


FLOPS = {
    "forward": "forward",  # Of the decoder layers' linears, and of the experts that tokens choose.
    "backward": "backward",
    "adapters": "adapters",
    "attention": "attention",  # In all passes, with scores made again and pairs that a mask hides.
    "head": "head",
    "reference": "the reference",
    "mismatched": "mismatched answers",  # Policy and reference, forward alone.
    "recomputation": "recomputation",
}
"""Categories of operations, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """Operations of one rank in an optimizer step, of all rows that it runs, empty ones among them."""

    by_kind: Mapping[str, int]
    """Operations by category (FLOPS), without empty ones."""
    counted: int
    """Operations that MFU counts."""
    tokens: int
    """Tokens that the rank runs."""

    @property
    def total(self) -> int:
        """Operations that are computed."""
        return sum(self.by_kind.values())

    def as_json(self) -> dict[str, Any]:
        """Return every figure, for programs."""
        return {"operations": dict(self.by_kind), "counted_by_mfu": self.counted, "tokens": self.tokens}


def step_flops(work: Workload, model: PlannedModel, machine: Machine) -> StepFlops:
    """Return the operations of a step's launches, with one document per sequence."""
    flops: Counter[str] = Counter()
    for name, launch, number in step_work(work, model, machine):
        if launch.flops:
            own = name == "mismatched" or (name not in ("forward", "backward") and launch.kind != "attention")
            flops[name if own or launch.kind == "products" else launch.kind] += round(launch.flops) * number
    return StepFlops(
        by_kind={kind: flops[kind] for kind in FLOPS if flops[kind]},
        counted=counted_flops(work, model, ranks=machine.ranks),
        tokens=work.train.accumulation(machine.ranks) * work.tokens_at_once,
    )


def step_work(work: Workload, model: PlannedModel, machine: Machine) -> StepWork:
    """Return the work of a step, with one document per sequence."""
    ranks, shards = machine.ranks, work.shard_degree(machine.ranks)
    micro_batches = work.train.accumulation(ranks)
    passes = traffic.passes_of(work, micro_batches)
    shapes, how = model.shapes, KernelOptions.planned(work, model.shapes, machine)
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
    copied, nbytes = copied_adapters(work, shapes, machine)
    copies = [KernelLaunch("update", (1 + FP32 / how.itemsize) * nbytes, launches=1 + copied)] if copied else []
    return StepWork(
        blocks=blocks_of(work, model, how),
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


def blocks_of(work: Workload, model: PlannedModel, how: KernelOptions) -> tuple[BlockWork, ...]:
    """Return the work of a micro-batch in each decoder layer."""
    length, rows, tile = work.sequence_length, work.train.micro_batch, work.train.mlp_tile or work.sequence_length
    tiles = [rows * min(tile, length - start) for start in range(0, length, tile)]
    works: dict[int, BlockWork] = {}
    layers = layers_of(work, model.shapes)
    for layer in layers:
        if id(layer) not in works:
            groups = layer.decoder.heads // layer.decoder.key_heads
            works[id(layer)] = block_work(
                layer,
                how,
                m=rows * length,
                pairs=rows * pairs_computed(how.attention, length, layer.kind.window, groups),
                checkpointing=work.train.checkpointing,
                tiles=tiles,
                reference=work.train.needs.reference,
            )
    return tuple(works[id(layer)] for layer in layers)


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
    work: Workload,
    model: PlannedModel,
    machine: Machine,
    *,
    rates: DeviceRates | None = None,
) -> StepTime | None:
    """Return the time of a step, with one document per sequence; None if a rate is unknown (`rates_of`).

    `rates`: rates to use in place of the node's.
    """
    rates = rates or rates_of(work, machine)
    if rates is None:
        return None
    done = step_work(work, model, machine)
    collectives = step_collectives(work, model, machine)
    parts = _parts(done, collectives, rates, prefetch=work.parallel.prefetch)
    by_term = plus(*parts.values())
    counted = counted_flops(work, model, ranks=machine.ranks)
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
        mfu=counted * rows / seconds / rates.peak,
        steps=work.steps,
        price_per_hour=machine.price_per_hour,
        assumptions=(*rates.assumptions, *_assumptions(work, machine)),
    )


def _parts(work: StepWork, collectives: StepCollectives, rates: DeviceRates, *, prefetch: bool) -> dict[Part, Seconds]:
    """Return the seconds of a step by part."""
    together, resident = work.micro_batches // work.passes, len(work.blocks) - work.moved_blocks
    copies = seconds_of_launches(work.gathers, rates)
    known: dict[tuple[int, bool], tuple[_Stage, _Stage]] = {}
    forward: list[_Stage] = []
    backward: list[_Stage] = []
    for index, block in enumerate(work.blocks):
        key = (id(block), index >= resident)
        if key not in known:
            directions = ((*block.forward, *block.reference), (*block.recomputation, *block.backward))
            own, again = (times(seconds_of_launches(launches, rates), together) for launches in directions)
            copied = copies if key[1] else {}
            known[key] = _Stage(plus(own, copied), key[1]), _Stage(plus(again, copied), key[1])
        forward.append(known[key][0])
        backward.append(known[key][1])
    backward.reverse()
    # Nothing else of the layer can run while its rows are exchanged.
    exchanges = [times(exchange.seconds(rates), work.micro_batches) for exchange in collectives.exchanges]
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


def seconds_of_launches(launches: Iterable[KernelLaunch], rates: DeviceRates) -> Seconds:
    """Return the seconds of launches one after the other; each by what it waits for."""
    by_term: Seconds = {"compute": 0.0, "memory": 0.0, "launches": 0.0}
    units = {"matrices": rates.matrices, "attention": rates.attention, "decoding": rates.decoding}
    for work in launches:
        moving, computing = work.nbytes / rates.bandwidth, (work.flops + work.padding) / units[work.unit]
        by_term["compute" if computing > moving else "memory"] += max(computing, moving)
        by_term["launches"] += work.launches * rates.launch
    return by_term


def _assumptions(work: Workload, machine: Machine) -> list[str]:
    """Return the assumptions on the run, beside the rates."""
    assumptions = [f"each sequence is one document of {work.sequence_length:,} tokens"]
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
