"""Estimate the rates of a GPU and its links, with sources, and the collectives of a step, as rings. No torch.

By a ring of n ranks each rank receives (n-1)/n of a gather and 2 (n-1)/n of a sum from its neighbour, over the node's
links or the network. So each ring with ranks inside and outside a node brings as many bytes into the node as into a
rank, which is more than the least that `traffic.StepBytes.into_machine` returns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
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
    found: Seconds = {}
    for part in parts:
        for term, seconds in part.items():
            found[term] = found.get(term, 0.0) + seconds
    return found


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

_BASE_SECONDS = 8.4e-6
_STEP_SECONDS = {"nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 14e-6}
_TREE_STEP_SECONDS = {"nvlink": 4.0e-6, "pcie": 4.0e-6, "network": 14e-6}
_LATENCY_SOURCE = "NCCL's own model (src/graph/tuning.cc, the protocol Simple)"
_GLOO_SECONDS = 1e-4
"""A step of gloo's between processes of one machine: an assumption without a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Operations and bytes a second that one rank gets, and seconds that pass before the first byte."""

    peak: float
    """What MFU divides by: the maker's figure, or the user's."""
    matrices: float
    attention: float
    decoding: float
    bandwidth: float
    launch: float
    link: float | None
    """None: not known, or one rank."""
    host_link: float | None
    network: float | None
    base: float
    """Seconds of any collective."""
    ring_step: float
    """Of each step of a ring within a machine."""
    ring_step_across: float
    tree_step: float
    tree_step_across: float
    said: tuple[str, ...]
    """The assumptions, a sentence each."""


LEVERS: dict[str, tuple[str, ...]] = {
    "products of matrices": ("matrices", "decoding"),
    "attention": ("attention",),
    "the GPU's memory": ("bandwidth",),
    "launches": ("launch",),
    "links within a machine": ("link",),
    "the network": ("network",),
    "starts of collectives": ("base", "ring_step", "ring_step_across", "tree_step", "tree_step_across"),
}
"""What a step's time rests on, by what one measurement would settle."""
_IN_SECONDS = ("launch", *LEVERS["starts of collectives"])


def half_as_fast(rates: Rates, lever: str) -> Rates:
    """Return the rates with twice the time for everything of this lever."""
    factors = {name: 2.0 if name in _IN_SECONDS else 0.5 for name in LEVERS[lever]}
    known = {name: factor * rate for name, factor in factors.items() if (rate := getattr(rates, name)) is not None}
    return dataclasses.replace(rates, **known)


def missing_rates(work: Workload, machine: Machine) -> tuple[str, ...]:
    """Return the settings of `gpu` that a step's time needs and nobody knows.

    Only links that are used count. No table has a GPU's fp32 rate.
    """
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


def rates_of(work: Workload, machine: Machine) -> Rates | None:
    """Return the rates that a run reaches; None if one that its time depends on is unknown (`missing_rates`).

    Rates that the user gave in `gpu.*` count as measured: the run reaches them.
    """
    peak, bandwidth = machine.flops, machine.bandwidth
    if missing_rates(work, machine) or peak is None or bandwidth is None:
        return None
    link = machine.link if machine.ranks_per_machine > 1 else None
    network = machine.network if machine.ranks > machine.ranks_per_machine else None
    given = machine.measured
    matrices = 1.0 if "tflops" in given else _MATRICES.get(machine.capability, _MATRICES_ELSEWHERE)
    attention = _ATTENTION.get(machine.capability, _ATTENTION_ELSEWHERE) if machine.is_gpu else 1.0
    memory = 1.0 if "memory_gb_per_second" in given else _MEMORY
    own = {
        "link": 1.0 if "link_gb_per_second" in given else _LINK,
        "host_link": 1.0 if "host_gb_per_second" in given else _LINK,
        "network": 1.0 if "network_gb_per_second" in given else _LINK,
    }
    inside = "nvlink" if machine.has_nvlink else "pcie"
    said = [
        f"products of matrices run at {matrices:.0%} of {peak / 1e12:,.4g} TFLOP/s: "
        + ("as gpu.tflops says" if "tflops" in given else _MATRICES_SOURCE),
        f"memory delivers {memory:.0%} of {bandwidth / 1e9:,.4g} GB/s: "
        + ("as gpu.memory_gb_per_second says" if "memory_gb_per_second" in given else _MEMORY_SOURCE),
    ]
    if machine.is_gpu:
        said.append(f"attention runs at {attention:.0%} of the GPU's rate: {_ATTENTION_SOURCE}")
        said.append(f"a launch costs {_LAUNCH_SECONDS * 1e6:.0f} us: {_LAUNCH_SOURCE}")
    if machine.ranks > 1:
        inner, outer = "a GPU's link to others of its machine", "the network into a machine"
        for where, name, rate in ((inner, "link", link), (outer, "network", network)):
            if rate is not None:
                source = _LINK_SOURCE if own[name] < 1 else f"as gpu.{name}_gb_per_second says"
                said.append(f"{where} delivers {own[name]:.0%} of {rate / 1e9:,.4g} GB/s: {source}")
    if machine.is_gpu and machine.ranks > 1:
        said += _said_of_rings(inside, across=network is not None)
    return Rates(
        peak=peak,
        matrices=peak * matrices,
        attention=peak * attention,
        decoding=peak * matrices * _DECODING,
        bandwidth=bandwidth * memory,
        launch=_LAUNCH_SECONDS if machine.is_gpu else 0.0,
        link=None if link is None else link * own["link"],
        host_link=None if machine.host_link is None else machine.host_link * own["host_link"],
        network=None if network is None else network * own["network"],
        base=_BASE_SECONDS if machine.is_gpu else _GLOO_SECONDS,
        ring_step=_STEP_SECONDS[inside] if machine.is_gpu else _GLOO_SECONDS,
        ring_step_across=_STEP_SECONDS["network"],
        tree_step=_TREE_STEP_SECONDS[inside] if machine.is_gpu else _GLOO_SECONDS,
        tree_step_across=_TREE_STEP_SECONDS["network"],
        said=tuple(said),
    )


def _said_of_rings(inside: str, *, across: bool) -> Iterator[str]:
    yield (
        f"a collective is a ring (a sum may be a tree), whose steps cost {_STEP_SECONDS[inside] * 1e6:.1f} us within a "
        f"machine, and {_BASE_SECONDS * 1e6:.1f} us before the first: {_LATENCY_SOURCE}"
    )
    if across:
        yield f"a step of a ring between machines costs {_STEP_SECONDS['network'] * 1e6:.0f} us: {_LATENCY_SOURCE}"


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
    micro_batches = work.train.accumulation(world)
    passes = traffic.passes_of(work, micro_batches)
    step = traffic.ours(work, shapes, world=world, accumulation=micro_batches)
    shards, itemsize = step.shards, traffic.DTYPE_BYTES[work.train.dtype]
    rings = _Rings(world, shards, machine.ranks_per_machine)
    block = traffic.block_bytes(shapes.block, shards, quantized=work.quantized, itemsize=itemsize)
    ends = step.gathered // passes - 2 * traffic.moved_blocks(work, shapes) * block if shards > 1 else 0
    units = 3 if shapes.ties(work.adapter) else 4
    offloads = machine.is_gpu and offloads_base(work.parallel, shards)
    boundary = 0
    if work.train.checkpointing == "offload":
        boundary = itemsize * shapes.hidden * work.tokens_at_once * work.train.slices(world)
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
