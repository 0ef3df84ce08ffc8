"""Calculate the time of a step from its launches and the links that it uses, by closed formulas. Imports no torch.

A launch takes the longer of its bytes over the memory's rate and its operations over the unit's. A block in a pass
takes its launches, or what comes over the wire meanwhile, if that is longer: the next block's gather, the sum of the
gradients of the block before, its input on its way to the host or back. Without parallel.prefetch the gather comes
first and the block after it. Nothing stands beside the first gather of a pass, those of the embedding and the head, the
last bucket of gradients, and the optimizer. A second counts for what it waits for, so that all terms add up to the
step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distlora.planner.machine import Machine
from distlora.planner.model import PlannedModel
from distlora.planner.speed.collectives import Wiring, seconds_of, wiring_of
from distlora.planner.speed.compute import step_flops
from distlora.planner.speed.rates import TERMS, Rates, Seconds, Term, longest, plus, rates_of, times, total
from distlora.planner.speed.step_work import StepWork, step_work
from distlora.planner.speed.work import MovedKind, Work
from distlora.planner.workload import Workload

Part = Literal["forward", "backward", "head", "first gathers", "last sum", "update"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Time of one optimizer step, and of the run."""

    by_term: Mapping[Term, float]
    """By what is waited for."""
    by_part: Mapping[Part, float]
    moved: Mapping[MovedKind, float]
    """Bytes of a rank's device memory that the step reads and writes, by kind."""
    tokens: int
    """Of the step, over all ranks: its rows, whether they are full or not."""
    ranks: int
    mfu: float
    steps: int | None
    """Of the run; None: neither train.max_steps nor plan.tokens says how long it is."""
    price_per_hour: float | None
    """Of one GPU."""
    assumptions: tuple[str, ...]
    """A sentence each."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.by_term.values())

    @property
    def binds(self) -> Term:
        """The resource that a step waits for most."""
        return max(TERMS, key=lambda term: self.by_term.get(term, 0.0))

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
        """In the same currency; None: no price is said."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour / 3600 / self.tokens_per_second_of_a_rank * 1e6

    def as_json(self) -> dict[str, Any]:
        """Every figure, with what is derived of it."""
        derived = (
            "seconds",
            "binds",
            "tokens_per_second",
            "tokens_per_second_of_a_rank",
            "mfu",
            "steps",
            "hours",
            "cost",
            "cost_of_a_million_tokens",
        )
        return {
            **{name: getattr(self, name) for name in derived},
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
    wires = wiring_of(work, model, machine)
    parts = _parts(done, wires, rates, prefetch=work.parallel.prefetch)
    by_term = plus(*parts.values())
    flops = step_flops(work, model, ranks=machine.ranks, is_gpu=machine.is_gpu, document=document)
    seconds = total(by_term)
    # Rows that are missing are run as empty ones, and count for nothing.
    rows = work.global_batch / (machine.ranks * work.accumulation(machine.ranks) * work.micro_batch)
    tokens = work.global_batch * work.sequence_length
    return StepTime(
        by_term=by_term,
        by_part={name: total(part) for name, part in parts.items()},
        moved=done.moved,
        tokens=tokens,
        ranks=machine.ranks,
        mfu=flops.counted * rows / seconds / rates.peak,
        steps=work.steps,
        price_per_hour=machine.price_per_hour,
        assumptions=(*rates.said, *_said(work, machine, document)),
    )


def _parts(work: StepWork, wires: Wiring, rates: Rates, *, prefetch: bool) -> dict[Part, Seconds]:
    """Return the seconds of a step by part."""
    together, resident = work.micro_batches // work.passes, len(work.blocks) - work.moved_blocks
    copies = _seconds(work.gathers, rates)
    known: dict[tuple[int, bool], tuple[_Stage, _Stage]] = {}
    forward: list[_Stage] = []
    backward: list[_Stage] = []
    for index, block in enumerate(work.blocks):
        key = (id(block), index >= resident)
        if key not in known:
            directions = ((*block.forward, *block.reference), block.backward)
            own, again = (times(_seconds(launches, rates), together) for launches in directions)
            copied = copies if key[1] else {}
            known[key] = _Stage(plus(own, copied), key[1]), _Stage(plus(again, copied), key[1])
        forward.append(known[key][0])
        backward.append(known[key][1])
    backward.reverse()
    chain = _Chain(wires.gather.seconds(rates), wires.boundary.seconds(rates), prefetch)
    # Gradients are summed while the last backward goes on, on the wire that gathers take.
    summed = times(seconds_of(wires.sums, rates), 1 / len(backward))
    backwards = (times(chain.seconds(backward), work.passes - 1), chain.seconds(backward, beside=summed))
    first = (chain.first(forward), chain.first(backward), wires.ends.seconds(rates))
    return {
        "forward": times(chain.seconds(forward), work.passes),
        "backward": plus(*backwards),
        "head": times(_seconds(work.head, rates), work.passes),
        "first gathers": times(plus(*first), work.passes),
        "last sum": seconds_of(wires.last, rates),
        "update": _seconds(work.update, rates),
    }


class _Stage(NamedTuple):
    """A block in a pass; those that are alike are one object."""

    device: Seconds
    moves: bool
    """Whether it is gathered for it."""


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


def _seconds(launches: Iterable[Work], rates: Rates) -> Seconds:
    """One after the other; each by what it waits for."""
    found: Seconds = {"compute": 0.0, "memory": 0.0, "launches": 0.0}
    units = {"matrices": rates.matrices, "attention": rates.attention, "decoding": rates.decoding}
    for work in launches:
        moving, computing = work.nbytes / rates.bandwidth, work.flops / units[work.unit]
        found["compute" if computing > moving else "memory"] += max(computing, moving)
        found["launches"] += work.launches * rates.launch
    return found


def _said(work: Workload, machine: Machine, document: int | None) -> list[str]:
    """Return the assumptions on the run, beside the rates."""
    length = work.sequence_length
    documents = f"each row is one document of {length:,} tokens"
    if document is not None and document < length:
        documents = f"rows of {length:,} tokens hold documents of {document:,}"
    said = [documents]
    if machine.is_gpu and work.liger and machine.has_liger:
        said.append("liger-kernel is installed, where the run can use it")
    if machine.is_gpu and work.deterministic_attention:
        said.append("attention's gradients in a fixed order take no longer than in any")
    if work.parallel.resident_blocks == "auto" and machine.ranks > 1:
        said.append("no block stays gathered: how many will is found out in the first step")
    if work.adapter.use_dora and not machine.is_gpu:
        said.append("DoRA's magnitudes are folded into packed weights, as on a GPU")
    said.append("neither loading nor evaluations, samples or saves are counted, and the host keeps ahead of the device")
    return said
