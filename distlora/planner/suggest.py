"""Find what would fit, larger runs, and how many trials of a sweep fit on one base. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distlora.config import ClusterConfig
from distlora.config.plan import CHOSEN, GPUS
from distlora.planner import Plan, plan_of
from distlora.planner.choose import (
    RESERVE,
    Choice,
    Search,
    Settings,
    choose,
    cost_of,
    has_room,
    micro_batches,
    resolve_auto,
    typed,
)
from distlora.planner.machine import Machine, machine_of
from distlora.planner.memory import Kind
from distlora.system.numbers import size

LEAST_LENGTH, LEAST_RANK = 256, 4
"""Smallest sequence length and adapter rank that are suggested."""
MOST_AT_ONCE = 2
"""Most settings that are combined with each other; larger changes come from a search of all settings."""
MOST_RANKS = 1024
_FIXED = frozenset({"quant.method"})
"""Settings that change the result."""
_LEAST: Settings = {
    "quant.dense_layers": 0,
    "parallel.prefetch": False,
    "parallel.shard_degree": None,
    "parallel.resident_blocks": 0,
}
"""Values that never need more memory than others, on a GPU or a host. They are not searched for the least memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """Settings with which a run fits."""

    changes: int
    """Number of changes; offloading the base is one change of two settings."""
    settings: Settings
    plan: Plan

    def __str__(self) -> str:
        overrides = " ".join(typed(name, value) for name, value in self.settings.items())
        device, host = self.plan.device, self.plan.host  # The processes of a CPU node share its memory.
        return f"{overrides} ({size(device.total if self.plan.machine.is_gpu else host.workers)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """The nearest settings that fit; all fields are None if nothing does."""

    same: Fitting | None = None
    """The fewest settings to change for the same result."""
    other: Fitting | None = None
    """The change that gives up least of the result (shorter sequences, a smaller rank, NF4), if none keeps it."""
    more: Fitting | None = None
    """The fewest GPUs of the same model that are enough, with their settings."""
    gpu: Fitting | None = None
    """The smallest known GPU that is enough in the same number, with its settings."""
    least: Plan | None = None
    """The plan with the least memory, if no settings with the same result fit."""

    def __str__(self) -> str:
        texts = [f"set {fitting}" for fitting in (self.same, self.other) if fitting is not None]
        texts += [] if self.more is None else [f"use {self.more.plan.machine.ranks:,} of these GPUs with {self.more}"]
        if self.gpu is not None:
            machine = self.gpu.plan.machine
            number = "one" if machine.ranks == 1 else f"{machine.ranks:,} x"
            texts.append(f"use {number} {machine.name} with {self.gpu}")
        if self.least is not None and not self.least.machine.is_gpu:
            return "name the GPU, such as gpu=h100 (distlora plan --help lists them)"
        return ", or ".join(texts) or "does not fit on any number of these GPUs that was tried, nor on any known GPU"


def nearest(plan: Plan) -> Nearest:
    """Find the smallest change of settings that fits, whoever set them: one setting, then two, then more.

    Among changes of equally many settings the fastest wins. If no change keeps the result, the one that gives up least
    of it wins. More GPUs and other GPUs are tried only if neither helps.
    """
    same = _same(plan)
    least = None
    if same is None:
        plans = _smallest(plan).plans()
        least = min(plans, key=lambda each: each.device.total if each.machine.is_gpu else each.host.machine)
    other = None if same is not None else _giving_up(plan, least)
    if same is not None or other is not None:
        return Nearest(same=same, other=other)
    return Nearest(more=_more_gpus(plan), gpu=_other_gpu(plan), least=least)


def memory_saving_changes(plan: Plan) -> list[Settings]:
    """Return the single settings that take less memory and keep the result."""
    search = Search(config=plan.config, model=plan.model, machine=plan.machine)
    singles: list[Settings] = []
    for setting in CHOSEN:
        values, given = search.values(setting), plan.config.value_of(setting)
        smaller = values[values.index(given) + 1 :] if given in values else values
        singles += [{setting: value} for value in smaller]
    offloaded = {
        name: value
        for each in search.storages[-1:]
        for name, value in each.items()
        if value != plan.config.value_of(name)
    }
    singles += [offloaded] if offloaded else []
    if not plan.machine.is_gpu:  # Processes share the memory of their node.
        singles += [{"cluster.gpus_per_node": n} for n in range(plan.machine.ranks_per_machine - 1, 0, -1)]
    return singles


def result_changing_savings(plan: Plan) -> list[Settings]:
    """Return the single settings that take less memory and change the result."""
    config = plan.config
    singles: list[Settings] = []
    if config.quant.method == "none":
        singles.append({"quant.method": "nf4"})
    if config.optim.name == "adamw":
        singles.append({"optim.name": "adamw_8bit"})
        singles += [{"optim.name": "paged_adamw_8bit"}] if plan.machine.is_gpu else []
    singles += [{"data.sequence_length": n} for n in _halves(config.data.sequence_length, LEAST_LENGTH)]
    if config.adapter.method == "lora" and config.adapter.init_from is None:
        singles += [{"adapter.r": n} for n in _halves(config.adapter.r, LEAST_RANK)]
        if config.adapter.target_modules in ("all-linear", "linears", "mlp"):
            singles.append({"adapter.target_modules": "attention"})
    return singles


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _same(plan: Plan) -> Fitting | None:
    """Return the fewest settings that fit with the same result; the fastest of as many."""
    for count in range(MOST_AT_ONCE + 1):
        combinations = itertools.combinations(memory_saving_changes(plan), count)
        fitting = [each for each in _tried(plan, combinations) if has_room(each.plan)]
        if fitting:
            return min(fitting, key=lambda each: cost_of(each.plan))
    return _chosen(plan)


def _giving_up(plan: Plan, least: Plan | None) -> Fitting | None:
    """Return the change that gives up least of the result and fits; None if none does.

    `least` is the plan that takes least memory with the same result; each change is first tried with its settings.
    """
    singles = result_changing_savings(plan)
    combinations = [each for n in range(1, MOST_AT_ONCE + 1) for each in itertools.combinations(singles, n)]
    tried = sorted(_tried(plan, combinations), key=lambda each: (given_up(plan, each.plan), each.changes))
    beside = {} if least is None else Search(config=plan.config, model=plan.model, machine=plan.machine).changed(least)
    for fitting in tried:
        settings = {name: value for name, value in beside.items() if name not in fitting.settings}
        smallest = fitting.plan.replan(settings)
        if smallest is None or not has_room(smallest):
            continue
        rest = _same(fitting.plan)
        if rest is not None:
            changes = fitting.changes + rest.changes
            return Fitting(changes=changes, settings={**fitting.settings, **rest.settings}, plan=rest.plan)
    return None


def given_up(plan: Plan, other: Plan) -> tuple[float, ...]:
    """Return a sort key of the loss: halvings of sequence length and rank, then NF4 and 8-bit optimizers."""
    before, after = plan.config, other.config
    lengths = math.log2(before.data.sequence_length / after.data.sequence_length)
    ranks = math.log2(before.adapter.r / after.adapter.r)
    ranks += before.adapter.target_modules != after.adapter.target_modules
    return (
        lengths + ranks,
        lengths,
        before.quant.method != after.quant.method,
        before.optim.name != after.optim.name,
    )


def _smallest(plan: Plan) -> Search:
    """Return the search among the settings with the least memory."""
    config = plan.config.if_valid(_LEAST) or plan.config
    return Search(
        config=config, model=plan.model, machine=plan.machine, fixed=frozenset({*_FIXED, *_LEAST}), reserve=0.0
    )


def _tried(plan: Plan, combinations: Iterable[Sequence[Settings]]) -> Iterator[Fitting]:
    for parts in combinations:
        names = [name for change in parts for name in change]
        settings = {name: value for change in parts for name, value in change.items()}
        config = plan.config.if_valid(settings) if len(settings) == len(names) else None
        if config is not None:
            machine = plan.machine
            if "cluster.gpus_per_node" in settings:
                machine = with_ranks(machine, config.cluster)
            yield Fitting(changes=len(parts), settings=settings, plan=plan_of(config, plan.model, machine))


def with_ranks(machine: Machine, cluster: ClusterConfig) -> Machine:
    """Return the same nodes with as many ranks as the cluster settings have."""
    ranks, per_node, usable = cluster.ranks, cluster.gpus_per_node, machine.usable_bytes
    if not machine.is_gpu and machine.host_bytes is not None:
        usable = machine.host_bytes // per_node
    return dataclasses.replace(machine, ranks=ranks, ranks_per_machine=per_node, usable_bytes=usable)


def _chosen(plan: Plan) -> Fitting | None:
    """Return the fastest fitting plan of the whole space, without the changes that it does not need."""
    given = Search(config=plan.config, model=plan.model, machine=plan.machine, fixed=_FIXED, reserve=0.0)
    chosen = choose(given).plan
    if not has_room(chosen):
        return None
    for setting in reversed(CHOSEN):
        without = chosen.replan({setting: plan.config.value_of(setting)})
        if without is not None and without.config != chosen.config and has_room(without):
            chosen = without
    settings = given.changed(chosen)
    return Fitting(changes=len(settings), settings=settings, plan=chosen)


def _more_gpus(plan: Plan) -> Fitting | None:
    """Return the plan on the fewest GPUs of the same model that hold the run with the same result."""
    have, per_node = plan.machine.ranks, max(plan.machine.ranks_per_machine, 8)
    machines = (per_node * 2**n for n in range(1, int(math.log2(MOST_RANKS / per_node)) + 1))
    for ranks in (*range(have + 1, per_node + 1), *machines) if plan.machine.is_gpu else ():
        cluster: dict[str, object] = {"cluster.gpus_per_node": min(ranks, per_node)}
        if ranks > per_node:
            cluster = {"cluster.launcher": "slurm", **cluster, "cluster.nodes": -(-ranks // per_node)}
        config = plan.config.if_valid(cluster) if ranks > have else None
        if config is None:
            continue
        fitting = _elsewhere(cluster, plan_of(config, plan.model, with_ranks(plan.machine, config.cluster)))
        if fitting is not None:
            return fitting
    return None


def _other_gpu(plan: Plan) -> Fitting | None:
    """Return the plan on the smallest known GPU that holds the run with the same result on as many GPUs."""
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.usable_bytes) if plan.machine.is_gpu else ():
        named: dict[str, object] = {"gpu.name": gpu.name}
        named |= {} if plan.config.gpu.memory_gib is None else {"gpu.memory_gib": None}
        config = plan.config.if_valid(named)
        if config is not None and gpu.usable_bytes > (plan.machine.usable_bytes or 0):
            machine = dataclasses.replace(machine_of(config.gpu, config.cluster), host_bytes=plan.machine.host_bytes)
            fitting = _elsewhere(named, plan_of(config, plan.model, machine))
            if fitting is not None:
                return fitting
    return None


def _elsewhere(settings: Settings, plan: Plan) -> Fitting | None:
    """Return the fewest settings that fit on other GPUs, where `plan` has the `settings` that name them."""
    if not any(map(has_room, _smallest(plan).on_gpus())):
        return None
    rest = _same(plan)
    if rest is None:
        return None
    return Fitting(changes=len(settings) + rest.changes, settings={**settings, **rest.settings}, plan=rest.plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class LargerRun:
    """A larger run and its memory."""

    what: str
    """Its command-line override: `train.micro_batch=4`, `model=llama3_70b`."""
    total: int
    """Bytes per rank."""
    fits: bool | None
    chosen_again: bool = False
    """True if it fits only with the settings that plan=auto or quant.dense_layers=auto would choose for it."""

    def __str__(self) -> str:
        verdict = {True: "fits", False: "does not fit", None: "is not checked"}[self.fits]
        return f"{self.what}: {size(self.total)}, {verdict}{' with other settings' if self.chosen_again else ''}"


def larger_runs(choice: Choice) -> list[LargerRun]:
    """Return the needs of the next larger micro-batch, sequence length and adapter rank.

    Chosen settings that do not fit are chosen again. A larger model is not among them: deriving what it is takes as
    long as the plan that was requested.
    """
    plan, config = choice.plan, choice.config
    limit, length = plan.model.settings.get("max_position_embeddings"), 2 * config.data.sequence_length
    numbers = micro_batches(config.train, plan.machine.ranks)
    micro = next((n for n in numbers if n > config.train.micro_batch), None)
    tries: list[Settings] = [] if micro is None else [{"train.micro_batch": micro}]
    tries += [{"data.sequence_length": length}] if not isinstance(limit, int) or length <= limit else []
    tries += [{"adapter.r": 2 * config.adapter.r}] if config.adapter.method == "lora" else []
    return [
        _larger_run(choice, " ".join(typed(*entry) for entry in settings.items()), larger_run, settings)
        for settings in tries
        if (larger_run := plan.replan(settings)) is not None
    ]


def _larger_run(choice: Choice, what: str, plan: Plan, settings: Settings) -> LargerRun:
    quant, chooses = choice.search.config.quant, plan.config.plan.mode == "auto"
    if plan.fits is False and (chooses or quant.dense_layers == "auto"):
        config = plan.config.with_settings({"quant.dense_layers": quant.dense_layers})
        fixed = {*choice.search.fixed, *settings}
        search = dataclasses.replace(choice.search, config=config, model=plan.model, fixed=fixed)
        again = (choose if chooses else resolve_auto)(search).plan
        if again.fits:
            return LargerRun(what=what, total=again.device.total, fits=True, chosen_again=True)
    return LargerRun(what=what, total=plan.device.total, fits=plan.fits)


MAX_TRIALS = 64
"""Most trials that are planned together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiTrialPlan:
    """Plans of equal trials that are trained together."""

    alone: Plan
    plan: Plan
    """Plan of all trials together."""
    trials: int
    requested: int | Literal["auto"]
    """Value of sweep.packed."""
    most: int | None
    """Most trials that fit, up to MAX_TRIALS; None if the available memory is unknown."""
    beyond: Plan | None
    """Plan of one trial more than fit."""

    @property
    def ratio(self) -> float | None:
        """Step time of all trials over that of one trial alone; None if the rates of the node are unknown."""
        pack, alone = self.plan.time, self.alone.time
        return None if pack is None or alone is None else pack.seconds / alone.seconds

    @property
    def binds(self) -> Kind | None:
        """Category of memory that each further trial takes most of; None if the limit is unknown."""
        if self.beyond is None:
            return None
        more = Counter(self.beyond.device.by_kind)
        more.subtract(self.alone.device.by_kind)
        return max(more, key=lambda kind: more[kind])

    def as_json(self) -> dict[str, Any]:
        """Return every figure as JSON values."""
        alone, beyond = self.alone, self.beyond
        return {
            "trials": self.trials,
            "asked": self.requested,
            "most": self.most,
            "fits": self.plan.fits,
            "of_one_trial": {
                "total": alone.device.total,
                "seconds": None if alone.time is None else alone.time.seconds,
                "gathered": alone.traffic.gathered,
            },
            "steps_of_one_trial": self.ratio,
            "one_more": None if beyond is None else {"total": beyond.device.total, "takes_most_of": self.binds},
        }


def multi_trial_plan(plan: Plan, requested: int | Literal["auto"], *, most: int = MAX_TRIALS) -> MultiTrialPlan:
    """Plan the requested number of trials like that of a plan, or as many as fit with RESERVE free (`auto`)."""

    @functools.cache
    def together(number: int) -> Plan:
        return plan_of(plan.config, plan.model, plan.machine, trials=[plan.work] * number)

    fit = None if plan.machine.usable_bytes is None else _most(lambda number: has_room(together(number)), most)
    if requested != "auto":
        trials = requested
    else:
        trials = 1 if fit is None else max(1, _most(lambda number: has_room(together(number), RESERVE), most))
    beyond = together(fit + 1) if fit is not None and fit < most else None
    return MultiTrialPlan(
        alone=together(1), plan=together(trials), trials=trials, requested=requested, most=fit, beyond=beyond
    )


def _most(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, by bisection; 0 if none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = min(2 * low, (low + high) // 2) if low else 1
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest(plans: Iterable[Plan]) -> Plan:
    """Return the plan of the trial that takes the most memory; trials that differ are planned as copies of it."""
    return max(plans, key=lambda plan: plan.device.total)
