"""Divide a step's network traffic among its collectives, by rings. Imports no torch.

`wire.ours` says how many bytes a step moves; here they are divided among what they travel beside. By a ring of n ranks
each rank receives (n-1)/n of a gather and 2 (n-1)/n of a sum, from its neighbour: over the machine's own links, or over
the network where the neighbour is elsewhere. So into a machine come as many bytes over the network as into a rank, for
each ring that has ranks in it and outside: more than the least that `wire.StepBytes.into_machine` says, which is what
would have to come in if what is there already were passed on inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from distlora.architecture.shapes import ModelShapes
from distlora.config.deepspeed_file import offloads_base
from distlora.planner import traffic
from distlora.planner.machine import Machine
from distlora.planner.model import PlannedModel
from distlora.planner.speed.rates import Rates, Seconds, plus
from distlora.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossing:
    """Bytes, and what passes before the first of them."""

    inside: float = 0.0
    """Into a rank from others of its machine."""
    across: float = 0.0
    """Into a machine from others."""
    host: float = 0.0
    """Between a rank's device and its host."""
    collectives: int = 0
    steps: float = 0.0
    """Of rings within a machine, of all collectives."""
    steps_across: float = 0.0
    tree_steps: float | None = None
    """The same of trees, where sums may be trees; None: rings alone."""
    tree_steps_across: float = 0.0

    def seconds(self, rates: Rates) -> Seconds:
        """Return the seconds of the slower link, the host's link before it, and latencies."""
        found: Seconds = {}
        inside = self.inside / rates.link if self.inside and rates.link else 0.0
        across = self.across / rates.network if self.across and rates.network else 0.0
        if inside or across:
            found["link" if inside >= across else "network"] = max(inside, across)
        if self.host:
            assert rates.host_link is not None
            found["host_link"] = self.host / rates.host_link
        latency = self.steps * rates.ring_step + self.steps_across * rates.ring_step_across
        if self.tree_steps is not None:
            tree = self.tree_steps * rates.tree_step + self.tree_steps_across * rates.tree_step_across
            latency = min(latency, tree)
        latency += self.collectives * rates.base
        if latency:
            found["latency"] = latency
        return found

    def scaled(self, share: float) -> Crossing:
        """So much of its bytes, at as many collectives."""
        return replace(self, inside=share * self.inside, across=share * self.across, host=share * self.host)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """Collectives of one rank in a step."""

    gather: Crossing
    """Of one block."""
    ends: Crossing
    """Of a pass: embedding, head and last norm."""
    boundary: Crossing
    """Of a block and pass: the inputs that are kept in host memory, one way."""
    sums: tuple[Crossing, ...]
    """Of a step, beside the last backward: gradients, but for the last."""
    last: tuple[Crossing, ...]
    """What is summed when backward is over."""


def wiring_of(work: Workload, model: PlannedModel, machine: Machine) -> Wiring:
    """Return the collectives of one rank in a step."""
    world, shapes = machine.ranks, model.shapes
    micro_batches = work.accumulation(world)
    passes = traffic.passes_of(work, micro_batches)
    step = traffic.ours(work, shapes, world=world, accumulation=micro_batches)
    shards, itemsize = step.shards, traffic.DTYPE_BYTES[work.dtype]
    rings = _Rings(world, shards, machine.ranks_per_machine)
    block = traffic.block_bytes(shapes.block, shards, quantized=work.quantized, itemsize=itemsize)
    ends = step.gathered // passes - 2 * traffic.moved_blocks(work, shapes) * block if shards > 1 else 0
    units = 3 if shapes.ties(work.adapter) else 4
    offloads = machine.is_gpu and offloads_base(work.parallel, shards)
    boundary = 0
    if work.checkpointing == "offload":
        boundary = itemsize * shapes.hidden * work.tokens_at_once * work.slices(world)
    sums, last = _sums(work, step, shapes, rings)
    return Wiring(
        gather=replace(rings.gather(block), host=block / shards if offloads else 0.0),
        ends=replace(rings.gather(ends, units), host=ends / shards if offloads else 0.0),
        boundary=Crossing(host=boundary),
        sums=sums,
        last=last,
    )


def _sums(
    work: Workload, step: traffic.StepBytes, shapes: ModelShapes, rings: _Rings
) -> tuple[tuple[Crossing, ...], tuple[Crossing, ...]]:
    """Return the gradient sums (beside backward, after backward).

    The last bucket of adapter gradients comes after it, for each trial. Of a trained base, all but the decoder layers
    come after it.
    """
    bucket, trials = int(work.parallel.bucket_mb * 2**20), len(work.adapters)
    last = min(step.reduced, bucket * trials)
    after = [rings.sum(last, trials)]
    beside = [rings.sum(step.reduced - last, -(-(step.reduced - last) // bucket))]
    if step.scattered:
        # Of adapter=full the blocks' gradients are scattered while backward goes on.
        layers, share = shapes.num_layers, 0.0
        if work.adapter.method == "full":
            share = layers * sum(weight.numel for weight in shapes.block) / shapes.numel
        scatter, rows = rings.gather(step.scattered, 3), rings.sum_of_copies(step.reduced_rows, 3)
        after += [scatter.scaled(1 - share), rows.scaled(1 - share)]
        if share:
            beside += [rings.gather(step.scattered, layers).scaled(share)]
            beside += [rings.sum_of_copies(step.reduced_rows, layers).scaled(share)]
    return tuple(beside), tuple(after)


@dataclass(frozen=True, slots=True)
class _Rings:
    """The ranks as collectives see them: consecutive ones cut a copy, and fill machines."""

    world: int
    shards: int
    per_machine: int

    def gather(self, nbytes: int, collectives: int = 1) -> Crossing:
        """Return a gather, or a reduce-scatter, of a buffer over the ranks of a copy."""
        n = self.shards
        if n == 1 or nbytes == 0:
            return Crossing()
        received = nbytes * (n - 1) / n
        machines = -(-n // self.per_machine)
        return Crossing(
            inside=received if self.per_machine > 1 else 0.0,
            across=received * self._crossing,
            collectives=collectives,
            steps=collectives * (n - machines),
            steps_across=collectives * (machines - 1),
        )

    @property
    def _crossing(self) -> int:
        """Rings of copies that have ranks in a machine and outside; of the machine that has most of them."""
        starts = range(0, self.world, self.per_machine)
        machines = [range(start, min(start + self.per_machine, self.world)) for start in starts]
        if len(machines) == 1:
            return 0
        # Machines repeat after as many as it takes until a copy begins where a machine does.
        repeat = math.lcm(self.shards, self.per_machine) // self.per_machine
        return max(len(self._rings_across(machine)) for machine in {*machines[:repeat], machines[-1]})

    def _rings_across(self, machine: range) -> set[int]:
        copies = {machine[0] // self.shards, machine[-1] // self.shards}
        return {
            copy for copy in copies if copy * self.shards < machine.start or (copy + 1) * self.shards > machine.stop
        }

    def sum(self, nbytes: int, collectives: int = 1) -> Crossing:
        """Return an all-reduce of a buffer over all ranks."""
        n = self.world
        if n == 1 or nbytes <= 0:
            return Crossing()
        received, machines = 2 * nbytes * (n - 1) / n, -(-n // self.per_machine)
        return Crossing(
            inside=received if self.per_machine > 1 else 0.0,
            across=received if machines > 1 else 0.0,
            collectives=collectives,
            steps=2 * collectives * (n - machines),
            steps_across=2 * collectives * (machines - 1),
            tree_steps=2 * collectives * (min(n, self.per_machine) - 1),
            tree_steps_across=2 * collectives * math.log2(machines),
        )

    def sum_of_copies(self, nbytes: int, collectives: int) -> Crossing:
        """Return an all-reduce of a rank's rows over the ranks with the same rows."""
        copies = self.world // self.shards
        if copies == 1 or nbytes == 0:
            return Crossing()
        received = 2 * nbytes * (copies - 1) / copies
        within = max(1, self.per_machine // self.shards)
        machines = -(-copies // within)
        return Crossing(
            inside=received if within > 1 else 0.0,
            across=received * min(self.shards, self.per_machine) if machines > 1 else 0.0,
            collectives=collectives,
            steps=2 * collectives * (copies - machines),
            steps_across=2 * collectives * (machines - 1),
        )


def seconds_of(crossings: tuple[Crossing, ...], rates: Rates) -> Seconds:
    """One after the other."""
    return plus(*(crossing.seconds(rates) for crossing in crossings))
