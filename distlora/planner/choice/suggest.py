"""Find what would fit if the settings do not: other settings, more GPUs or other GPUs. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distlora.config import Config
from distlora.config.gpus import GPUS
from distlora.config.plan import CHOSEN
from distlora.planner import Plan, plan_of
from distlora.planner.choice.choose import choose, cost_of, has_room, on_gpus, plans
from distlora.planner.choice.space import RECOMPUTES, TILE, Settings, changed, if_valid, micro_batches, typed, value_of
from distlora.planner.machine import Machine, machine_of
from distlora.planner.model import PlannedModel
from distlora.system.numbers import size

LEAST_LENGTH, LEAST_RANK = 256, 4
"""What a row and a rank are not shortened below."""
MOST_AT_ONCE = 2
"""Settings that are tried together, each with each; more are found by choosing all of them."""
MOST_RANKS = 1024
_FIXED = frozenset({"quant.method"})
"""What is not chosen where another result is not asked for."""
_LEAST: Settings = {
    "train.keep_dequantized": False,
    "parallel.prefetch": False,
    "parallel.shard_degree": None,
    "parallel.resident_blocks": 0,
}
"""With these nothing takes more than with others, on a GPU or a host: so they are not searched where it is asked
whether anything fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """Settings with which a run fits."""

    changes: int
    """What is to be changed; the base in host memory is one change, and two settings."""
    settings: Settings
    plan: Plan

    def __str__(self) -> str:
        words = " ".join(typed(name, value) for name, value in self.settings.items())
        device, host = self.plan.device, self.plan.host  # A CPU's processes have their machine's memory together.
        return f"{words} ({size(device.total if self.plan.machine.is_gpu else host.workers)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """The nearest settings that fit; all fields are None if nothing does."""

    same: Fitting | None
    """The fewest settings to change for the same result."""
    other: Fitting | None
    """What gives up least of the result (shorter rows, a smaller rank, NF4), where no settings keep all of it, or with
    fewer settings than they take."""
    more: Fitting | None = None
    """The fewest such GPUs that are enough, and with which settings."""
    gpu: Fitting | None = None
    """The smallest known GPU of which as many are enough, and with which settings."""
    least: Plan | None = None
    """The plan that takes least, where no setting makes one fit."""

    def __str__(self) -> str:
        said = [f"set {found}" for found in (self.same, self.other) if found is not None]
        said += [] if self.more is None else [f"take {self.more.plan.machine.ranks:,} such GPUs with {self.more}"]
        if self.gpu is not None:
            machine = self.gpu.plan.machine
            number = "one" if machine.ranks == 1 else f"{machine.ranks:,} x"
            said.append(f"take {number} {machine.name} with {self.gpu}")
        if self.least is not None and not self.least.machine.is_gpu:
            return "name the GPUs that it is for, as gpu=h100 (distlora plan --help lists them)"
        return ", or ".join(said) or "no number of such GPUs and no known GPU holds it"


def nearest(config: Config, model: PlannedModel, machine: Machine) -> Nearest:
    """Find the smallest change of settings that fits, whoever set them: one setting, then two, then more.

    Among changes of equally many settings the fastest wins. If no change keeps the result, the one that gives up least
    of it wins. More GPUs and other GPUs are tried only if neither helps.
    """
    plan = plan_of(config, model, machine)
    same = _same(plan)
    least = None if same is not None else _least(plan)
    other = _with_fewer(plan, same.changes) if same is not None else _giving_up(plan, least)
    if same is not None or other is not None:
        return Nearest(same=same, other=other)
    return Nearest(same=None, other=None, more=_more_gpus(plan), gpu=_other_gpu(plan), least=least)


def moves(plan: Plan) -> list[Settings]:
    """Single settings that take less memory and change no result."""
    config, model, machine = plan.config, plan.model, plan.machine
    train, parallel, ranks = config.train, config.parallel, machine.ranks
    found: list[Settings] = []
    for mode in RECOMPUTES[RECOMPUTES.index(train.checkpointing) + 1 :]:
        found.append({"train.checkpointing": mode})
    found += [{"train.micro_batch": n} for n in reversed(micro_batches(config, machine)) if n < train.micro_batch]
    found += [{"train.accumulate": "step"}] if train.accumulate == "block" else []
    found += [{"train.keep_dequantized": False}] if train.keep_dequantized else []
    if train.mlp_tile is None and config.data.sequence_length >= 2 * TILE and model.shapes.family.experts is None:
        found.append({"train.mlp_tile": TILE})
    if ranks > 1:
        found += [{"parallel.resident_blocks": 0}] if parallel.resident_blocks != 0 else []
        found += [{"parallel.prefetch": False}] if parallel.prefetch else []
        found += [{"parallel.shard_degree": None}] if parallel.shard_degree is not None else []
        if machine.is_gpu and not parallel.offload_base:
            offload: dict[str, object] = {"parallel.backend": "zero3"} if parallel.backend != "zero3" else {}
            found.append(offload | {"parallel.offload_base": True})
    if not machine.is_gpu:  # Processes share what their machine has.
        found += [{"cluster.gpus_per_node": n} for n in range(machine.ranks_per_machine - 1, 0, -1)]
    return found


def sacrifices(config: Config, machine: Machine) -> list[Settings]:
    """Single settings that take less memory and train something else, or by other numbers."""
    found: list[Settings] = []
    if config.quant.method == "none":
        found.append({"quant.method": "nf4"})
    if config.optim.name == "adamw":
        found.append({"optim.name": "adamw_8bit"})
        found += [{"optim.name": "paged_adamw_8bit"}] if machine.is_gpu else []
    found += [{"data.sequence_length": n} for n in _halves(config.data.sequence_length, LEAST_LENGTH)]
    if config.adapter.method == "lora" and config.adapter.init_from is None:
        found += [{"adapter.r": n} for n in _halves(config.adapter.r, LEAST_RANK)]
        if config.adapter.target_modules in ("all-linear", "mlp"):
            found.append({"adapter.target_modules": "attention"})
    return found


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _same(plan: Plan) -> Fitting | None:
    """Return the fewest settings that fit with the same result."""
    return _fewest(plan, moves(plan)) or _chosen(plan)


def _fewest(plan: Plan, singles: Sequence[Settings]) -> Fitting | None:
    """Return the fastest fitting combination of as few of `singles` as possible."""
    for count in range(MOST_AT_ONCE + 1):
        fitting = [found for found in _tried(plan, itertools.combinations(singles, count)) if has_room(found.plan)]
        if fitting:
            return min(fitting, key=lambda found: cost_of(found.plan))
    return None


def _with_fewer(plan: Plan, changes: int) -> Fitting | None:
    """Return the change of fewer settings than `changes` that gives up least of the result."""
    singles = [*moves(plan), *sacrifices(plan.config, plan.machine)]
    combinations = (
        each for n in range(1, min(MOST_AT_ONCE, changes - 1) + 1) for each in itertools.combinations(singles, n)
    )
    fitting = [found for found in _tried(plan, combinations) if has_room(found.plan)]
    return min(fitting, key=lambda found: (*_order(plan, found), cost_of(found.plan)), default=None)


def _giving_up(plan: Plan, least: Plan | None) -> Fitting | None:
    """Return the change that gives up least of the result and fits; None if none does.

    `least` is the plan that takes least memory with the same result; each change is first tried with its settings.
    """
    singles = sacrifices(plan.config, plan.machine)
    combinations = [each for n in range(1, MOST_AT_ONCE + 1) for each in itertools.combinations(singles, n)]
    tried = sorted(_tried(plan, combinations), key=lambda found: _order(plan, found))
    beside = {} if least is None else changed(plan.config, least.config)
    for found in tried:
        settings = {name: value for name, value in beside.items() if name not in found.settings}
        smallest = if_valid(found.plan.config, settings)
        if smallest is None or not has_room(plan_of(smallest, plan.model, plan.machine)):
            continue
        rest = _same(found.plan)
        if rest is not None:
            changes = found.changes + rest.changes
            return Fitting(changes=changes, settings={**found.settings, **rest.settings}, plan=rest.plan)
    return None


def _order(plan: Plan, found: Fitting) -> tuple[float, ...]:
    return *given_up(plan.config, found.plan.config), found.changes


def given_up(said: Config, found: Config) -> tuple[float, ...]:
    """Return a sort key of the loss: halvings of sequence length and rank, then NF4 and 8-bit optimizers."""
    rows = math.log2(said.data.sequence_length / found.data.sequence_length)
    ranks = math.log2(said.adapter.r / found.adapter.r) + (said.adapter.target_modules != found.adapter.target_modules)
    return rows + ranks, rows, said.quant.method != found.quant.method, said.optim.name != found.optim.name


def _least(plan: Plan) -> Plan:
    """Return the plan that takes the least memory of all settings that may be chosen."""
    said = if_valid(plan.config, _LEAST) or plan.config
    found = plans(said, {*_FIXED, *_LEAST}, plan.model, plan.machine)
    return min(found, key=lambda plan: plan.device.total if plan.machine.is_gpu else plan.host.machine)


def _tried(plan: Plan, combinations: Iterable[Sequence[Settings]]) -> Iterator[Fitting]:
    for parts in combinations:
        names = [name for part in parts for name in part]
        settings = {name: value for part in parts for name, value in part.items()}
        config = if_valid(plan.config, settings) if len(settings) == len(names) else None
        if config is not None:
            machine = plan.machine
            if "cluster.gpus_per_node" in settings:
                machine = with_ranks(machine, config)
            yield Fitting(changes=len(parts), settings=settings, plan=plan_of(config, plan.model, machine))


def with_ranks(machine: Machine, config: Config) -> Machine:
    """Return the same nodes with as many ranks as the cluster settings have."""
    ranks, each, usable = config.cluster.ranks, config.cluster.gpus_per_node, machine.usable_bytes
    if not machine.is_gpu and machine.host_bytes is not None:
        usable = machine.host_bytes // each
    return dataclasses.replace(machine, ranks=ranks, ranks_per_machine=each, usable_bytes=usable)


def _chosen(plan: Plan) -> Fitting | None:
    """Return the fastest fitting plan of the whole space, without the changes that it does not need."""
    found = choose(plan.config, _FIXED, plan.model, plan.machine, reserve=0.0).plan
    if not has_room(found):
        return None
    for setting in reversed(CHOSEN):
        config = if_valid(found.config, {setting: value_of(plan.config, setting)})
        if config is not None and config != found.config:
            without = plan_of(config, plan.model, plan.machine)
            found = without if has_room(without) else found
    settings = changed(plan.config, found.config)
    return Fitting(changes=len(settings), settings=settings, plan=found)


def _more_gpus(plan: Plan) -> Fitting | None:
    """Return the plan on the fewest GPUs of the same model that hold the run with the same result."""
    have, each = plan.machine.ranks, max(plan.machine.ranks_per_machine, 8)
    machines = (each * 2**n for n in range(1, int(math.log2(MOST_RANKS / each)) + 1))
    for ranks in (*range(have + 1, each + 1), *machines) if plan.machine.is_gpu else ():
        cluster: dict[str, object] = {"cluster.gpus_per_node": min(ranks, each)}
        if ranks > each:
            cluster = {"cluster.launcher": "slurm", **cluster, "cluster.nodes": -(-ranks // each)}
        config = if_valid(plan.config, cluster) if ranks > have else None
        found = None if config is None else _elsewhere(plan, cluster, config, with_ranks(plan.machine, config))
        if found is not None:
            return found
    return None


def _other_gpu(plan: Plan) -> Fitting | None:
    """Return the plan on the smallest known GPU that holds the run with the same result on as many GPUs."""
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.usable_bytes) if plan.machine.is_gpu else ():
        named: dict[str, object] = {"gpu.name": gpu.name}
        named |= {} if plan.config.gpu.memory_gib is None else {"gpu.memory_gib": None}
        config = if_valid(plan.config, named)
        if config is not None and gpu.usable_bytes > (plan.machine.usable_bytes or 0):
            own = plan.machine
            machine = dataclasses.replace(
                machine_of(config.gpu, config.cluster), host_bytes=own.host_bytes, has_liger=own.has_liger
            )
            found = _elsewhere(plan, named, config, machine)
            if found is not None:
                return found
    return None


def _elsewhere(plan: Plan, words: Settings, config: Config, machine: Machine) -> Fitting | None:
    """On other machines, that `words` name in `config`: the fewest settings with which it fits there."""
    said = if_valid(config, _LEAST) or config
    if not any(map(has_room, on_gpus(said, {*_FIXED, *_LEAST}, plan.model, machine, 0.0))):
        return None
    rest = _same(plan_of(config, plan.model, machine))
    if rest is None:
        return None
    return Fitting(changes=len(words) + rest.changes, settings={**words, **rest.settings}, plan=rest.plan)
