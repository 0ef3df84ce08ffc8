"""Estimate the rates of a GPU and its links, with sources, and the collectives of a step, as rings. No torch.

By a ring of n ranks each rank receives (n-1)/n of a gather and 2 (n-1)/n of a sum from its neighbour, over the node's
links or the network. So each ring with ranks inside and outside a node brings as many bytes into the node as into a
rank, which is more than the least that `traffic.StepBytes.into_machine` returns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from distlora.architecture.shapes import ModelShapes
from distlora.config.deepspeed_file import offloads_base
from distlora.planner import traffic
from distlora.planner.machine import Machine
from distlora.planner.model import PlannedModel
from distlora.planner.storage import keeps_on_host
from distlora.planner.workload import Workload

Term = str
"""A resource that a step's time goes to: a key of WAITS."""
WAITS = {
    "compute": "computing",
    "memory": "the GPU's memory",
    "launches": "launches",  # From one kernel to the next.
    "link": "other GPUs",  # Of the node.
    "network": "other machines",
    "host_link": "host memory",
    "latency": "the start of collectives",
}
"""Resources, in words."""
Seconds = dict[Term, float]


def total(seconds: Mapping[Term, float]) -> float:
    """Return the sum of all terms."""
    return sum(seconds.values())


def plus(*parts: Seconds) -> Seconds:
    """Add up seconds that pass one after the other."""
    total: Seconds = {}
    for term_seconds in parts:
        for term, seconds in term_seconds.items():
            total[term] = total.get(term, 0.0) + seconds
    return total


def times(seconds: Seconds, number: float) -> Seconds:
    """Return the seconds `number` times."""
    return {term: number * each for term, each in seconds.items()}


def longest(*beside: Seconds) -> Seconds:
    """Return the longest of operations that overlap."""
    return max(beside, key=total)


_MATRICES = {(8, 0): 0.87, (9, 0): 0.80, (10, 0): 0.78}
_MATRICES_ELSEWHERE = 0.80
_MATRICES_SOURCE = (
    "the best shapes among the matmuls that stas00/ml-engineering measured (compute/accelerator): 87 % on the A100, "
    "80 % on the H100, 78 % on the B200; taken as 80 % elsewhere"
)
"""Share of the dense bf16 rate that the library's products reach, by compute capability: the A100's, the H100's, the
B200's."""

_ATTENTION = {(9, 0): 0.35, (10, 0): 0.15}
_ATTENTION_ELSEWHERE = 0.55
_ATTENTION_SOURCE = (
    "FlashAttention-2, forward and backward (arXiv 2307.08691: 50 to 73 % on an A100; arXiv 2407.08608: 35 % on an "
    "H100; on a B200 taken as no faster than that)"
)

_DECODING = 0.5
"""Of the products' rate, in a product that decodes its weight (an estimate of 0.4 to 0.6, not measured)."""
_MEMORY = 0.9
_MEMORY_SOURCE = "the H100's 3.0 of 3.35 TB/s in a large copy"
_LINK = 0.8
_LINK_SOURCE = "about what nccl-tests show of NVLink, and PCIe after its headers"
_LAUNCH_SECONDS = 3e-6
_LAUNCH_SOURCE = "from the end of one kernel to the start of the next, an estimate, not measured"

_BASE_SECONDS, _STEP_SECONDS, _STEP_SECONDS_ACROSS = 8.4e-6, 3.4e-6, 14e-6
"""Seconds before a collective, and of each step within a node (by NVLink) and between nodes. PCIe and trees change a
training step by less than 1 %."""
_LATENCY_SOURCE = "NCCL's own model (src/graph/tuning.cc, the protocol Simple)"
_GLOO_SECONDS = 1e-4
"""A step of gloo's between processes of one machine: an assumption without a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """Operations and bytes a second that one rank gets, and seconds that pass before the first byte."""

    peak: float
    """Rate that MFU divides by: the maker's figure, or the user's."""
    matrices: float
    attention: float
    decoding: float
    bandwidth: float
    launch: float
    link: float | None
    """None if unknown, or with one rank."""
    host_link: float | None
    network: float | None
    base: float
    """Seconds of any collective before its first step."""
    step: float
    """Seconds of each step of a ring or a tree within a node."""
    step_across: float
    """Seconds of each step between nodes."""
    assumptions: tuple[str, ...]
    """Assumptions, one sentence each."""


LEVERS: dict[str, tuple[str, ...]] = {
    "products of matrices": ("matrices", "decoding"),
    "attention": ("attention",),
    "the GPU's memory": ("bandwidth",),
    "launches": ("launch",),
    "links within a node": ("link",),
    "the network": ("network",),
    "starts of collectives": ("base", "step", "step_across"),
}
"""Rates that a step's time depends on, by the measurement that would settle them."""
_IN_SECONDS = ("launch", *LEVERS["starts of collectives"])


def half_as_fast(rates: DeviceRates, lever: str) -> DeviceRates:
    """Return the rates with twice the time for everything of this lever."""
    factors = {name: 2.0 if name in _IN_SECONDS else 0.5 for name in LEVERS[lever]}
    known = {name: factor * rate for name, factor in factors.items() if (rate := getattr(rates, name)) is not None}
    return dataclasses.replace(rates, **known)


def missing_rates(work: Workload, machine: Machine) -> tuple[str, ...]:
    """Return the settings of `gpu` that the time needs and that are unknown, such as fp32 rates; unused links aside."""
    in_fp32 = machine.is_gpu and work.train.dtype == "fp32" and "tflops" not in machine.measured
    needed = {
        "tflops": (True, None if in_fp32 else machine.flops),
        "memory_gb_per_second": (True, machine.bandwidth),
        "link_gb_per_second": (machine.ranks_per_machine > 1, machine.link),
        "network_gb_per_second": (machine.ranks > machine.ranks_per_machine, machine.network),
        "host_gb_per_second": (
            keeps_on_host(work.parallel, work.train.checkpointing, work.shard_degree(machine.ranks)),
            machine.host_link,
        ),
    }
    return tuple(f"gpu.{name}" for name, (is_needed, rate) in needed.items() if is_needed and rate is None)


def rates_of(work: Workload, machine: Machine) -> DeviceRates | None:
    """Return the rates that a run reaches, in full those given in `gpu.*`; None if a needed rate is unknown."""
    peak, bandwidth = machine.flops, machine.bandwidth
    if missing_rates(work, machine) or peak is None or bandwidth is None:
        return None
    is_gpu = machine.is_gpu
    link = machine.link if machine.ranks_per_machine > 1 else None
    network = machine.network if machine.ranks > machine.ranks_per_machine else None
    attention = _ATTENTION.get(machine.capability, _ATTENTION_ELSEWHERE) if is_gpu else 1.0
    usual = {
        "tflops": (_MATRICES.get(machine.capability, _MATRICES_ELSEWHERE), _MATRICES_SOURCE),
        "memory_gb_per_second": (_MEMORY, _MEMORY_SOURCE),
        **dict.fromkeys(("link_gb_per_second", "network_gb_per_second", "host_gb_per_second"), (_LINK, _LINK_SOURCE)),
    }
    reached = {name: (1.0, f"as gpu.{name} says") if name in machine.measured else usual[name] for name in usual}

    def describe_rate(what: str, name: str, rate: float, unit: float, unit_name: str) -> str:
        share, source = reached[name]
        return f"{what} {share:.0%} of {rate / unit:,.4g} {unit_name}: {source}"

    assumptions = [
        describe_rate("products of matrices run at", "tflops", peak, 1e12, "TFLOP/s"),
        describe_rate("memory delivers", "memory_gb_per_second", bandwidth, 1e9, "GB/s"),
    ]
    if is_gpu:
        assumptions.append(f"attention runs at {attention:.0%} of the GPU's rate: {_ATTENTION_SOURCE}")
        assumptions.append(f"a launch costs {_LAUNCH_SECONDS * 1e6:.0f} us: {_LAUNCH_SOURCE}")
    if link is not None:
        what = "a GPU's link to the others of its node delivers"
        assumptions.append(describe_rate(what, "link_gb_per_second", link, 1e9, "GB/s"))
    if network is not None:
        assumptions.append(
            describe_rate("the network into a node delivers", "network_gb_per_second", network, 1e9, "GB/s")
        )
    if is_gpu and machine.ranks > 1:
        assumptions.append(
            f"a collective is a ring (a sum may be a tree), whose steps cost {_STEP_SECONDS * 1e6:.1f} us "
            f"within a node, and {_BASE_SECONDS * 1e6:.1f} us before the first: {_LATENCY_SOURCE}"
        )
        if network is not None:
            across = _STEP_SECONDS_ACROSS * 1e6
            assumptions.append(f"a step between nodes costs {across:.0f} us: {_LATENCY_SOURCE}")
    matrices, host_link = peak * reached["tflops"][0], machine.host_link
    return DeviceRates(
        peak=peak,
        matrices=matrices,
        attention=peak * attention,
        decoding=matrices * _DECODING,
        bandwidth=bandwidth * reached["memory_gb_per_second"][0],
        launch=_LAUNCH_SECONDS if is_gpu else 0.0,
        link=None if link is None else link * reached["link_gb_per_second"][0],
        host_link=None if host_link is None else host_link * reached["host_gb_per_second"][0],
        network=None if network is None else network * reached["network_gb_per_second"][0],
        base=_BASE_SECONDS if is_gpu else _GLOO_SECONDS,
        step=_STEP_SECONDS if is_gpu else _GLOO_SECONDS,
        step_across=_STEP_SECONDS_ACROSS,
        assumptions=tuple(assumptions),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveCost:
    """Bytes of collectives, and the steps before the first byte."""

    inside: float = 0.0
    """Bytes into a rank from others of its node."""
    across: float = 0.0
    """Bytes into a node from others."""
    host: float = 0.0
    """Bytes between a rank's device and its host."""
    collectives: int = 0
    steps: float = 0.0
    """Steps of rings within a node, of all collectives."""
    steps_across: float = 0.0
    tree_steps: float | None = None
    """Steps of trees, where sums may be trees; None for rings only."""
    tree_steps_across: float = 0.0

    def seconds(self, rates: DeviceRates) -> Seconds:
        """Return the seconds of the slower link, the host's link before it, and latencies."""
        by_term: Seconds = {}
        inside = self.inside / rates.link if self.inside and rates.link else 0.0
        across = self.across / rates.network if self.across and rates.network else 0.0
        if inside or across:
            by_term["link" if inside >= across else "network"] = max(inside, across)
        if self.host:
            assert rates.host_link is not None
            by_term["host_link"] = self.host / rates.host_link
        latency = self.steps * rates.step + self.steps_across * rates.step_across
        if self.tree_steps is not None:
            latency = min(latency, self.tree_steps * rates.step + self.tree_steps_across * rates.step_across)
        latency += self.collectives * rates.base
        if latency:
            by_term["latency"] = latency
        return by_term

    def scaled(self, share: float) -> CollectiveCost:
        """Return a share of the bytes, at as many collectives."""
        return replace(self, inside=share * self.inside, across=share * self.across, host=share * self.host)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCollectives:
    """Collectives of one rank in a step."""

    gather: CollectiveCost
    """Gather of one layer, the mean of all."""
    ends: CollectiveCost
    """Gathers of a pass: embedding, LM head and last norm."""
    boundary: CollectiveCost
    """Offloaded inputs of a layer and pass, one way."""
    sums: tuple[CollectiveCost, ...]
    """Gradient sums beside the last backward."""
    last: tuple[CollectiveCost, ...]
    """Gradient sums after backward."""
    exchanges: tuple[CollectiveCost, CollectiveCost] = (CollectiveCost(), CollectiveCost())
    """Exchanges of rows between divided experts in a micro-batch, or gathers of chosen ones: forward, and backward with
    recomputation."""


def step_collectives(work: Workload, model: PlannedModel, machine: Machine) -> StepCollectives:
    """Return the collectives of one rank in a step."""
    world, shapes = machine.ranks, model.shapes
    micro_batches = work.train.accumulation(world)
    passes = traffic.passes_of(work, micro_batches)
    step = traffic.step_traffic(work, shapes, world=world, accumulation=micro_batches)
    shards, itemsize = step.shards, work.itemsize
    rings = _Rings(world, shards, machine.ranks_per_machine)
    moved = traffic.moved_bytes(work, shapes, shards)
    block = moved // max(1, traffic.moved_blocks(work, shapes))
    of_layers, of_ends = traffic.gathers_per_pass(work)
    ends = ((step.gathered - step.on_demand) // passes - of_layers * moved) // of_ends if shards > 1 else 0
    units = 3 if shapes.ties(work.adapter) or work.train.needs.labels else 4
    offloads = machine.is_gpu and offloads_base(work.parallel, shards)
    boundary = 0
    if work.train.checkpointing == "offload":
        boundary = itemsize * shapes.hidden * work.tokens_at_once * work.train.slices(world)
    sums, last = _sums(work, step, shapes, rings)
    layers = sum(count for kind, count in shapes.architecture.counted() if kind.experts is not None)
    forwards = 1 if work.train.checkpointing == "none" else 2
    demanded = step.on_demand / micro_batches / of_layers
    chosen = replace(rings.gather(demanded, 3 * layers), host=demanded / shards if offloads else 0.0)
    # In a forward, or the gradients'; with mismatched answers two forwards more.
    exchanged = step.exchanged / micro_batches / (forwards + 1 + 2 * work.train.needs.mismatched)
    return StepCollectives(
        gather=replace(rings.gather(block), host=block / shards if offloads else 0.0),
        ends=replace(rings.gather(ends, units), host=ends / shards if offloads else 0.0),
        boundary=CollectiveCost(host=boundary),
        sums=sums,
        last=last,
        # In a forward rows are sent and come back, after their numbers.
        exchanges=(chosen, chosen)
        if step.on_demand
        else (
            rings.exchange(exchanged, 3 * layers),
            rings.exchange(forwards * exchanged, (3 * forwards - 1) * layers),
        ),
    )


def _sums(
    work: Workload, step: traffic.StepBytes, shapes: ModelShapes, rings: _Rings
) -> tuple[tuple[CollectiveCost, ...], tuple[CollectiveCost, ...]]:
    """Return the gradient sums (beside backward, after it); the last bucket, embedding and head come after it."""
    bucket, trials = int(work.parallel.bucket_mb * 2**20), len(work.adapters)
    last = min(step.reduced, bucket * trials)
    after = [rings.sum(last, trials)]
    beside = [rings.sum(step.reduced - last, -(-(step.reduced - last) // bucket))]
    if step.scattered:
        # Of adapter=full the blocks' gradients are scattered while backward goes on.
        layers, share = shapes.num_layers, 0.0
        if work.adapter.method == "full":
            share = sum(count * kind.numel for kind, count in shapes.architecture.counted()) / shapes.numel
        scatter, rows = rings.gather(step.scattered, 3), rings.sum_over_replicas(step.reduced_rows, 3)
        after += [scatter.scaled(1 - share), rows.scaled(1 - share)]
        if share:
            beside += [rings.gather(step.scattered, layers).scaled(share)]
            beside += [rings.sum_over_replicas(step.reduced_rows, layers).scaled(share)]
    return tuple(beside), tuple(after)


@dataclass(frozen=True, slots=True)
class _Rings:
    """The ranks as collectives see them: consecutive ones shard a replica, and fill nodes."""

    world: int
    shards: int
    per_machine: int

    def gather(self, nbytes: float, collectives: int = 1) -> CollectiveCost:
        """Return a gather, or a reduce-scatter, of a buffer over the ranks of a replica."""
        n = self.shards
        if n == 1 or nbytes == 0:
            return CollectiveCost()
        received = nbytes * (n - 1) / n
        machines = -(-n // self.per_machine)
        return CollectiveCost(
            inside=received if self.per_machine > 1 else 0.0,
            across=received * self._crossing,
            collectives=collectives,
            steps=collectives * (n - machines),
            steps_across=collectives * (machines - 1),
        )

    def exchange(self, nbytes: float, collectives: int) -> CollectiveCost:
        """Return all-to-alls of rows over the ranks of a replica: each rank gets as much from every other one."""
        n, in_node = self.shards, min(self.shards, self.per_machine)
        if n == 1 or nbytes == 0:
            return CollectiveCost()
        return CollectiveCost(
            inside=nbytes * (in_node - 1) / n,
            across=in_node * nbytes * (n - in_node) / n,
            collectives=collectives,
            steps=collectives,
            steps_across=collectives if n > in_node else 0,
        )

    @property
    def _crossing(self) -> int:
        """Return the number of rings of replicas with ranks inside and outside a node, for the node with the most."""
        size, shards = self.per_machine, self.shards
        machines = [range(start, min(start + size, self.world)) for start in range(0, self.world, size)]
        if len(machines) == 1:
            return 0
        # Machines repeat after as many as it takes until a replica begins where a machine does.
        repeat = math.lcm(shards, size) // size
        most = 0
        for machine in {*machines[:repeat], machines[-1]}:
            ends = {machine[0] // shards, machine[-1] // shards}
            is_split = [n * shards < machine.start or (n + 1) * shards > machine.stop for n in ends]
            most = max(most, sum(is_split))
        return most

    def sum(self, nbytes: int, collectives: int = 1) -> CollectiveCost:
        """Return an all-reduce of a buffer over all ranks."""
        n = self.world
        if n == 1 or nbytes <= 0:
            return CollectiveCost()
        received, machines = 2 * nbytes * (n - 1) / n, -(-n // self.per_machine)
        return CollectiveCost(
            inside=received if self.per_machine > 1 else 0.0,
            across=received if machines > 1 else 0.0,
            collectives=collectives,
            steps=2 * collectives * (n - machines),
            steps_across=2 * collectives * (machines - 1),
            tree_steps=2 * collectives * (min(n, self.per_machine) - 1),
            tree_steps_across=2 * collectives * math.log2(machines),
        )

    def sum_over_replicas(self, nbytes: int, collectives: int) -> CollectiveCost:
        """Return an all-reduce of a rank's rows over the ranks with the same rows."""
        replicas = self.world // self.shards
        if replicas == 1 or nbytes == 0:
            return CollectiveCost()
        received = 2 * nbytes * (replicas - 1) / replicas
        within = max(1, self.per_machine // self.shards)
        machines = -(-replicas // within)
        return CollectiveCost(
            inside=received if within > 1 else 0.0,
            across=received * min(self.shards, self.per_machine) if machines > 1 else 0.0,
            collectives=collectives,
            steps=2 * collectives * (replicas - machines),
            steps_across=2 * collectives * (machines - 1),
        )


def seconds_of(costs: tuple[CollectiveCost, ...], rates: DeviceRates) -> Seconds:
    """Return the seconds of collectives one after the other."""
    return plus(*(cost.seconds(rates) for cost in costs))
