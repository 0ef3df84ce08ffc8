"""Calculate how a run's speed grows with the number of GPUs, by the formula of a plan's time. Imports no torch.

Strong scaling keeps the global batch, and thus the results; weak scaling keeps the batch per rank. Efficiency is the
tokens/s per rank over those on the fewest ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distlora.config import ClusterConfig, ParallelConfig, UserError
from distlora.planner import Plan
from distlora.planner.machine import Machine
from distlora.planner.memory.device import device_bytes
from distlora.planner.model import PlannedModel
from distlora.planner.speed.rates import LEVERS, Term, half_as_fast, missing_rates, rates_of
from distlora.planner.speed.timing import step_time
from distlora.planner.workload import Workload

Layout = Literal["one replica", "replica per node"]
"""Sharding of the base: over all ranks, or over those of each node (parallel=hsdp)."""
LAYOUTS: tuple[Layout, ...] = ("one replica", "replica per node")
Scaling = Literal["strong", "weak"]

MAX_GPUS = 1024
"""Most GPUs of a table."""
GPUS_PER_NODE = 8
"""GPUs per node, if the nodes of the run have fewer."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """Links between GPUs: bytes per second in one direction, by data sheets."""

    name: str
    inside: float
    """Rate into a GPU from the others of its node."""
    network: float
    """Rate into a node from the others."""
    has_nvlink: bool


FABRICS: tuple[Fabric, ...] = (
    # NVLink 4 of an H100, and a 400 Gb/s adapter for each of 8.
    Fabric("NVLink 4, 8 x 400 Gb/s InfiniBand", 450e9, 400e9, has_nvlink=True),
    Fabric("NVLink 4, one 100 Gb/s Ethernet", 450e9, 12.5e9, has_nvlink=True),
    # 16 lanes, 128 of 130 bits.
    Fabric("PCIe 5, one 400 Gb/s InfiniBand", 63e9, 50e9, has_nvlink=False),
    Fabric("PCIe 4, one 100 Gb/s Ethernet", 31.5e9, 12.5e9, has_nvlink=False),
    Fabric("PCIe 4, one 10 Gb/s Ethernet", 31.5e9, 1.25e9, has_nvlink=False),
)
"""Common links, for comparison with those of the node."""


OWN = "its own"
"""Name of the node's links in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingRow:
    """A run on a number of GPUs."""

    ranks: int
    machines: int
    layout: Layout
    fabric: str
    rows: int
    """Sequences per step, of all ranks."""
    accumulation: int
    """Micro-batches per rank and step."""
    fits: bool | None
    """True if the run fits the memory of each rank; None if unknown."""
    seconds: float
    """Seconds per step."""
    tokens_per_second: float
    mfu: float
    efficiency: float
    """Tokens/s per rank over those of the first row of the same fabric."""
    binds: Term
    assumptions: tuple[str, ...]
    if_half: Mapping[str, float]
    """Fraction of tokens/s that remains if an unmeasured rate (`rates.LEVERS`) is half of the assumed one, by rate."""

    @property
    def tokens_of_a_rank(self) -> float:
        """Tokens per second and rank."""
        return self.tokens_per_second / self.ranks


def scaling(
    plan: Plan,
    *,
    kind: Scaling = "strong",
    fabrics: Sequence[Fabric] = (),
) -> list[ScalingRow]:
    """Return a row per fabric (default: the node's own links), layout and number of GPUs of this model (`numbers_of`).

    A node holds as many GPUs as in `plan`, at least 8. `kind=weak` keeps the sequences per rank. A replica per node is
    left out on one node. Raises UserError if a rate of the GPU or of a link is unknown.
    """
    config, machine = plan.config, plan.machine
    per_machine = max(machine.ranks_per_machine, GPUS_PER_NODE)
    rows = config.train.accumulation(machine.ranks) * config.train.micro_batch if kind == "weak" else None
    table: list[ScalingRow] = []
    for fabric in fabrics or (None,):
        joined = machine if fabric is None else _joined(machine, fabric)
        runs: list[tuple[Layout, Workload, Machine]] = []
        for layout in LAYOUTS:
            for number in numbers_of(per_machine):
                here = min(number, per_machine)
                if layout == "replica per node" and number <= here:
                    continue
                train = config.train
                if rows is not None:
                    train = dataclasses.replace(train, global_batch=rows * number)
                # `there` has the number of GPUs; the config checks that they can share a replica.
                run = dataclasses.replace(
                    config,
                    parallel=_parallel(config.parallel, number, None if layout == "one replica" else here),
                    train=train,
                    cluster=ClusterConfig(gpus_per_node=number),
                )
                there = dataclasses.replace(joined, ranks=number, ranks_per_machine=here)
                runs.append((layout, Workload.of(run), there))
        table += _rows(runs, plan.model, OWN if fabric is None else fabric.name)
    return table


def _parallel(parallel: ParallelConfig, ranks: int, shard_degree: int | None) -> ParallelConfig:
    """Return the parallel settings of a run on `ranks` ranks. One process neither gathers nor offloads its base."""
    if ranks == 1:
        return ParallelConfig(bucket_mb=parallel.bucket_mb)
    return dataclasses.replace(parallel, shard_degree=shard_degree)


def numbers_of(per_machine: int) -> tuple[int, ...]:
    """Return 1, 2, 4 ... GPUs of a node, all of them, then twice as many nodes each time, up to MAX_GPUS GPUs."""
    within = [2**n for n in range(per_machine.bit_length()) if 2**n < per_machine]
    machines = [per_machine * 2**n for n in range(MAX_GPUS.bit_length()) if n == 0 or per_machine * 2**n <= MAX_GPUS]
    return (*within, *machines)


def _joined(machine: Machine, fabric: Fabric) -> Machine:
    """Return the machine with the links of a fabric, of which the user has measured nothing."""
    return dataclasses.replace(
        machine,
        link=fabric.inside,
        network=fabric.network,
        has_nvlink=fabric.has_nvlink,
        measured=machine.measured - {"link_gb_per_second", "network_gb_per_second"},
    )


def _rows(runs: Iterable[tuple[Layout, Workload, Machine]], model: PlannedModel, fabric: str) -> Iterator[ScalingRow]:
    fewest: float | None = None
    for layout, work, machine in runs:
        time = step_time(work, model, machine)
        if time is None:
            named = "" if machine.gpu is not None else "gpu=NAME (gpu=h100), or "
            raise UserError(
                f"the scaling of {machine.name} is unknown without the rates of its GPU and links; set {named}"
                + ", ".join(missing_rates(work, machine))
            )
        fewest = fewest or time.tokens_per_second_of_a_rank
        usable, rates = machine.usable_bytes, rates_of(work, machine)
        assert rates is not None
        slower = {lever: step_time(work, model, machine, rates=half_as_fast(rates, lever)) for lever in LEVERS}
        yield ScalingRow(
            ranks=machine.ranks,
            machines=machine.ranks // machine.ranks_per_machine,
            layout=layout,
            fabric=fabric,
            rows=work.train.global_batch,
            accumulation=work.train.accumulation(machine.ranks),
            fits=None if usable is None else device_bytes(work, model, machine).total <= usable,
            seconds=time.seconds,
            tokens_per_second=time.tokens_per_second,
            mfu=time.mfu,
            efficiency=time.tokens_per_second_of_a_rank / fewest,
            binds=time.binds,
            assumptions=time.assumptions,
            if_half={lever: time.seconds / each.seconds for lever, each in slower.items() if each is not None},
        )
