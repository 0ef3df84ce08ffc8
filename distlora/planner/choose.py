"""Search for the fastest settings that fit, for `plan=auto` and `quant=auto`, and say why. Imports no torch.

The search is exact: first the storage and the sharding of the base, then each combination of how a step runs, then as
many resident layers as fit. A branch whose base alone does not fit ends at its first plan. Results do not depend on the
settings, but for quant.method: the low bits that a base is shipped in if they fit, or 16 bits if they fit on the GPUs
and are not far slower than NF4, else NF4.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.config import Config, TrainConfig
from distlora.config.plan import CHOSEN
from distlora.planner import Plan, plan_of
from distlora.planner.machine import Machine
from distlora.planner.memory import Kind
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload
from distlora.system.numbers import size

TILE = 4096
"""Tokens of an MLP's tile: thousands, as weights in NF4 are dequantized for each (config/training.py)."""
TILED_FROM = 16_384
"""Tokens per sequence from which tiles are tried."""
RECOMPUTES = ("none", "selective", "block", "offload")
"""Modes of train.checkpointing, from the least recomputation to the least device memory."""
RESERVE = 0.05
"""Fraction of a chosen plan's need that stays free: measured peaks differ from plans by up to this."""
WORTH = 0.01
"""Fraction of the fastest step's time below which no setting is changed."""
_OF_A_BRANCH: tuple[Kind, ...] = ("codes", "scales", "weights", "embeddings", "norms", "adapters", "optimizer")
"""Categories of memory that do not depend on how a step runs."""

_TOGETHER = ("parallel.backend", "parallel.offload_base")
"""Settings that are chosen and explained together: DeepSpeed alone offloads the base."""

Settings = Mapping[str, Any]
"""Values by dotted name."""
_GROUPS = {"quant.method": "quant", "gpu.name": "gpu", "cluster.launcher": "cluster"}
"""Settings that have a group in conf/, by whose name they are typed."""


def _held_in_any_way(plan: Plan) -> int:
    return sum(nbytes for kind, nbytes in plan.device.held.items() if kind in _OF_A_BRANCH)


def typed(setting: str, value: object) -> str:
    """Return a setting as a command-line override."""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"{_GROUPS.get(setting, setting)}={shown}"


def micro_batches(train: TrainConfig, ranks: int) -> list[int]:
    """Return the micro-batches to try, ascending: those that divide a rank's sequences, so that none is part empty."""
    sequences = -(-train.global_batch // ranks)
    return sorted({train.micro_batch, *(n for n in range(1, sequences + 1) if sequences % n == 0)})


def has_room(plan: Plan, reserve: float = 0.0) -> bool:
    """Return True if a plan fits with `reserve` of its need to spare; unknown memory counts as enough."""
    return plan.lacks(reserve) is None


def cost_of(plan: Plan) -> tuple[float, ...]:
    """Return a sort key of a step's cost: its seconds, or recomputation and traffic if the GPU's rates are unknown."""
    time = plan.time
    if time is not None:
        return (time.seconds,)
    config, train = plan.config, plan.config.train
    return (
        int(config.parallel.offload_base),
        plan.compute.total,
        plan.traffic.received,
        RECOMPUTES.index(train.checkpointing),
        _dequantized_layers(plan),
        int(train.mlp_tile is not None),
        int(not config.parallel.prefetch),
        -train.micro_batch,
    )


def _dequantized_layers(plan: Plan) -> float:
    """Return how many layers a step dequantizes: each in forward, in its recomputation and in backward."""
    quant, recomputes = plan.config.quant, plan.config.train.checkpointing in ("block", "offload")
    layers = plan.model.shapes.num_layers - quant.num_dense if plan.work.format is not None else 0
    return layers * (3 if recomputes else 2)


def is_as_good(cost: tuple[float, ...], best: tuple[float, ...]) -> bool:
    """Return True if a plan's cost is within WORTH of the best."""
    return cost == best if len(best) > 1 else cost[0] <= best[0] * (1 + WORTH)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A search for the settings of one run on given nodes."""

    config: Config
    """Settings before the search."""
    model: PlannedModel
    machine: Machine
    fixed: Collection[str] = ()
    """Dotted names of settings that the search must not change."""
    reserve: float = RESERVE
    """Fraction of a plan's need that stays free."""

    def with_settings(self, settings: Settings) -> Search:
        """Return the search from other settings. Raises UserError for values that exclude each other."""
        return dataclasses.replace(self, config=self.config.with_settings(settings))

    def plan(self, settings: Settings | None = None) -> Plan:
        """Return the plan of the settings before the search, with `settings` in place of theirs."""
        return plan_of(self.config.with_settings(settings or {}), self.model, self.machine)

    def changed(self, plan: Plan) -> dict[str, Any]:
        """Return the settings that a plan has changed, in the order of CHOSEN."""
        values = {setting: plan.config.value_of(setting) for setting in CHOSEN}
        return {setting: value for setting, value in values.items() if value != self.config.value_of(setting)}

    def fastest(self) -> Plan | None:
        """Return the fastest plan that fits, None if none does; the fewest changes decide within WORTH."""
        candidates = [(cost_of(plan), plan) for plan in self.on_gpus()]
        good: list[tuple[int, tuple[float, ...], Plan]] = []
        for cost, plan in sorted(candidates, key=lambda candidate: candidate[0]):
            if good and not is_as_good(cost, good[0][1]):
                break
            if has_room(plan, self.reserve):
                good.append((len(self.changed(plan)), cost, plan))
        return min(good, key=lambda candidate: candidate[:2])[2] if good else None

    def on_gpus(self) -> Iterator[Plan]:
        """Yield the plans that fit device memory, each with the given number of resident layers and the largest."""
        for branch in self._branches():
            yield from branch._fitting()

    def plans(self) -> Iterator[Plan]:
        """Yield every plan, with the given number of resident layers."""
        for branch in self._branches():
            for way in branch._ways():
                yield from branch._with_micro_batches(way)

    def _branches(self) -> Iterator[Search]:
        """Yield a search for each storage of the base, each number of ranks that shard it or divide experts."""
        for storage in self._storages():
            for degree in self._free("parallel.shard_degree"):
                shared = {**storage, "parallel.shard_degree": degree}
                for experts in self._expert_degrees(shared):
                    config = self.config.if_valid({**shared, **experts})
                    if config is not None:
                        yield dataclasses.replace(self, config=config)

    def _storages(self) -> list[Settings]:
        """Return the given backend and place of the base, and the others where several GPUs share it."""
        config, storages = self.config, list[Settings]([{}])
        for other in self.storages:
            # FSDP2 alone has resident layers.
            if other["parallel.backend"] == "zero3" and config.parallel.resident_blocks != 0:
                other = {**other, "parallel.resident_blocks": 0}
            new = {name for name, value in other.items() if value != config.value_of(name)}
            if not new & set(self.fixed) and new & set(_TOGETHER):
                storages.append(other)
        return storages

    @property
    def storages(self) -> list[Settings]:
        """Backends and places of a base that several GPUs share, the least device memory last."""
        config = self.config
        if not self.machine.is_gpu or self.machine.ranks == 1 or config.adapter.trains_base is not None:
            return []
        if config.parallel.deepspeed_config is not None:  # That file sets the storage.
            return []
        pairs = (("fsdp2", False), ("zero3", False), ("zero3", True))
        return [dict(zip(_TOGETHER, pair, strict=True)) for pair in pairs]

    def values(self, setting: str) -> list[Any]:
        """Return the values of a setting that keep the result, from the fastest to the least memory.

        Empty for a setting without effect on this run. Leaves out what cannot be better: block accumulation without
        sharding, and tiles for short sequences or experts.
        """
        config, machine, train = self.config, self.machine, self.config.train
        shards = config.shard_degree(machine.ranks) > 1
        match setting:
            case "train.checkpointing":
                return [*RECOMPUTES]
            case "train.micro_batch":
                return micro_batches(train, machine.ranks)[::-1]
            case "train.accumulate":
                return ["block", "step"] if shards else ["step"] if train.accumulate == "block" else []
            case "train.mlp_tile" if not self.model.shapes.architecture.has_experts:
                return [None, TILE] if config.data.sequence_length >= TILED_FROM else []
            case "parallel.prefetch" if shards:
                return [True, False]
            case "parallel.shard_degree" if machine.ranks > 1:
                per_node = machine.ranks_per_machine
                return [1, *(["node"] if machine.ranks > per_node > 1 else []), None]
            case "quant.dense_layers" | "parallel.resident_blocks":
                return [0]
        return []

    def _free(self, setting: str) -> list[Any]:
        """Return the values of a setting to try, the given one first."""
        given = self.config.value_of(setting)
        return [given, *(value for value in self.values(setting) if value != given and setting not in self.fixed)]

    def _expert_degrees(self, others: Settings) -> list[Settings]:
        """Return the numbers of ranks that divide the experts: as given, none, those of a replica."""
        setting, model, ranks = "parallel.expert_degree", self.model, self.machine.ranks
        if setting in self.fixed or not model.shapes.architecture.has_experts or ranks == 1:
            return [{}]
        config = self.config.if_valid({**others, setting: 1})
        if config is None or config.parallel.backend != "fsdp2":
            return [{setting: 1}]
        degree, format = config.shard_degree(ranks), Workload.of(config).format
        divides = degree > 1 and model.shapes.shards_whole_experts(format, degree)
        return [{setting: 1}, {setting: "replica"}] if divides else [{setting: 1}]

    def _ways(self) -> Iterator[Settings]:
        """Yield each combination of free values of accumulation, checkpointing, MLP tiles and prefetch."""
        names = ("train.accumulate", "train.checkpointing", "train.mlp_tile", "parallel.prefetch")
        for combination in itertools.product(*map(self._free, names)):
            yield dict(zip(names, combination, strict=True))

    def _fitting(self) -> Iterator[Plan]:
        """Yield the plans of one branch that fit device memory."""
        # Gradients of the base are whole from one micro-batch to the next: a larger micro-batch may take less.
        may_shrink = self.config.adapter.trains_base is not None
        for way in self._ways():
            for plan in self._with_micro_batches(way):
                if self._moves_more(plan):
                    continue
                if not self._lacks_device(plan):
                    yield plan
                    for setting in ("parallel.resident_blocks", "quant.dense_layers"):
                        if setting not in self.fixed and (more := self.with_most(plan, setting)):
                            yield more
                elif (1 + self.reserve) * _held_in_any_way(plan) > (plan.machine.usable_bytes or 0):
                    return
                elif not may_shrink:
                    break

    def _with_micro_batches(self, way: Settings) -> Iterator[Plan]:
        """Yield plans from the smallest micro-batch to the largest."""
        train, ranks = self.config.train, self.machine.ranks
        for number in sorted(self._free("train.micro_batch")):
            config = self.config.if_valid({**way, "train.micro_batch": number})
            if config is None:
                continue
            # train.accumulate changes nothing in a step of one micro-batch.
            if config.train.accumulation(ranks) > 1 or config.train.accumulate == train.accumulate:
                yield plan_of(config, self.model, self.machine)

    def _moves_more(self, plan: Plan) -> bool:
        """Return True if exchanging tokens moves no fewer bytes than gathering all experts does."""
        if plan.traffic.exchanged == 0 or "parallel.expert_degree" in self.fixed:
            return False
        gathering = plan.replan({"parallel.expert_degree": 1})
        return gathering is not None and plan.traffic.received >= gathering.traffic.received

    def _lacks_device(self, plan: Plan) -> bool:
        """Return True if the memory in which the model is trained is too small: a GPU's, or a CPU node's."""
        return plan.lacks_device(self.reserve) if plan.machine.is_gpu else not has_room(plan, self.reserve)

    def with_most(self, plan: Plan, setting: str) -> Plan | None:
        """Return the plan with as many layers as fit in this setting; None if that is not more than `plan` has."""
        given, best = plan.config.value_of(setting), None
        if not isinstance(given, int):
            return None
        low, high, guess = given, plan.model.shapes.num_layers, given + 1
        while low < high:
            tried = plan.replan({setting: guess})
            if tried is None:
                return None
            if self._lacks_device(tried):
                high = guess - 1
                guess = (low + high + 1) // 2
            else:
                low, best = guess, tried
                # Each layer takes as much as the last, so the room left gives the answer; one more does not fit.
                taken = max(1, (tried.device.total - plan.device.total) // (low - given))
                free = int((plan.machine.usable_bytes or 0) / (1 + self.reserve)) - tried.device.total
                guess = min(max(low + free // taken, low + 1), high)
        return best


TOO_SLOW = 1.5
"""Ratio of step times above which NF4 is taken although 16 bits fit. Plans are at 0.86 to 1.46 times published
speeds (README.md), so a smaller ratio may be an error of the plan, and 16 bits lose no precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingChange:
    """A setting that was chosen, or two that belong together, and why."""

    settings: Settings
    why: str

    @property
    def typed(self) -> str:
        """The settings as command-line overrides."""
        return " ".join(typed(name, value) for name, value in self.settings.items())

    def __str__(self) -> str:
        return f"{self.typed}: {self.why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The settings of a run after `plan=auto` and `quant=auto`, with its plan."""

    plan: Plan
    search: Search
    """The search that chose them, with the settings before it."""
    only_reason: str | None = None
    """Reason if quant=auto had one possible value."""
    other: Plan | None = None
    """The fastest plan with the other value of quant.method, if that fits too."""
    rate: SettingChange | None = None
    """The learning rate, if it was chosen by the model."""

    @property
    def config(self) -> Config:
        """The chosen settings, without an `auto` in quant.method."""
        return self.plan.config

    @property
    def changes(self) -> tuple[SettingChange, ...]:
        """The chosen settings with reasons. Makes a plan without each of them."""
        given = self.search.with_settings({"quant.method": self.config.quant.method})
        new = given.changed(self.plan)
        together = [name for name in _TOGETHER if name in new]
        groups = [together] if together else []
        groups += [[name] for name in new if name not in together]
        changes = [] if self.rate is None else [self.rate]
        changes += [] if self.search.config.quant.method != "auto" else [self._why_quantized()]
        for names in groups:
            without = self.plan.replan({name: given.config.value_of(name) for name in names})
            effect = "" if without is None else _difference(without, self.plan, given.reserve)
            # ZeRO-3 is explained by the offload that it is chosen for.
            meant = [name for name in names if name != "parallel.backend" or len(names) == 1]
            why = "; ".join(_meaning(name, new[name], self.plan) for name in meant)
            settings = {name: new[name] for name in names}
            changes.append(SettingChange(settings=settings, why=f"{_of_usable(self.plan)}, {why}{effect}"))
        return tuple(changes)

    def _why_quantized(self) -> SettingChange:
        """Return the value that quant=auto became, with the reason."""
        plan, other, method = self.plan, self.other, self.config.quant.method
        time, slower = plan.time, None if other is None else other.time
        if self.only_reason is not None:
            why = self.only_reason
        elif method == "keep":
            why = f"the base is kept as it is shipped, in {plan.model.shapes.kept_formats}, {_of_usable(plan)}"
        elif method == "none":
            why = f"the base fits in 16 bits, {_of_usable(plan)}"
            if time is not None and slower is not None:
                why += f": {time.tokens_per_second:,.0f} tokens/s, in NF4 {slower.tokens_per_second:,.0f}"
        elif other is not None and time is not None and slower is not None:
            why = (
                f"the base would fit in 16 bits, {_of_usable(other)}, but NF4 is {slower.seconds / time.seconds:.2f}x "
                f"faster: {time.tokens_per_second:,.0f} tokens/s, not {slower.tokens_per_second:,.0f}"
            )
        else:
            larger = "keep" if "keep" in _quantizations(self.search)[0] else "none"
            before = plan.replan({"quant.method": larger, "quant.dense_layers": 0})
            assert before is not None, f"quant={larger} was tried"
            form = "16 bits" if larger == "none" else f"{plan.model.shapes.kept_formats}, as it is shipped,"
            why = f"in {form} it would take {size(before.device.total)}, in NF4 {_of_usable(plan)}"
        return SettingChange(settings={"quant.method": method}, why=why)


def choose(search: Search) -> Choice:
    """Set every setting of CHOSEN that is not fixed to the value that makes the run fastest within the memory.

    quant.method is chosen only if it is `auto`. Without known rates, the plan that recomputes least wins, then the one
    with the least traffic. If nothing fits, or the memory is unknown, the settings stay as they are, with quant=nf4 for
    auto; `nearest` finds what would fit.
    """
    methods, only_reason = _quantizations(search)
    plans: list[Plan] = []
    zero = {"quant.dense_layers": 0} if search.config.quant.dense_layers == "auto" else {}
    for method in methods if search.machine.usable_bytes is not None else ():
        given = search.with_settings({"quant.method": method, **zero})
        given = dataclasses.replace(given, fixed={*search.fixed} - {*zero})
        # 16 bits are worth it if they lie on the GPUs; offloaded, NF4 is a quarter of the traffic.
        if method == "none" and len(methods) > 1:
            given = dataclasses.replace(given, fixed={*given.fixed, "parallel.offload_base"})
        plan = given.fastest()
        plans += [] if plan is None else [plan]
        if plan is not None and (plan.time is None or method == "keep"):
            break  # The faster method is unknown, or what is shipped is exact.
    times = [plan.time.seconds for plan in plans if plan.time is not None]
    if len(times) > 1 and times[0] > TOO_SLOW * times[1]:
        plans.reverse()
    plan = plans[0] if plans else search.plan({"quant.method": _if_nothing_fits(methods), **zero})
    return Choice(plan=plan, search=search, only_reason=only_reason, other=plans[1] if len(plans) > 1 else None)


def resolve_auto(search: Search) -> Choice:
    """Choose only what is `auto`: quant.method as `choose` does, and as many of quant.dense_layers as fit."""
    search = dataclasses.replace(search, fixed=frozenset(CHOSEN))
    if search.config.quant.dense_layers != "auto":
        return choose(search) if search.config.quant.method == "auto" else Choice(plan=search.plan(), search=search)
    # Dense layers need quantized weights, and the memory of some is unknown.
    methods, only_reason = _quantizations(search)
    plan = search.plan({"quant.method": _if_nothing_fits(methods), "quant.dense_layers": 0})
    if "keep" in methods and not has_room(plan, search.reserve):
        smaller = search.plan({"quant.method": methods[-1], "quant.dense_layers": 0})
        plan = smaller if has_room(smaller, search.reserve) else plan
    most = None if search.machine.usable_bytes is None else search.with_most(plan, "quant.dense_layers")
    return Choice(plan=most or plan, search=search, only_reason=only_reason)


def _if_nothing_fits(methods: list[str]) -> str:
    """Return the value of quant.method if none fits: the base as it is shipped, else the smallest."""
    return "keep" if "keep" in methods else methods[-1]


def _quantizations(search: Search) -> tuple[list[str], str | None]:
    """Return the values of quant.method to try, in order, and the reason if `auto` leaves only one."""
    config, model = search.config, search.model
    if config.quant.method != "auto":
        return [config.quant.method], None
    if config.adapter.method == "full":
        return ["none"], "adapter=full trains every parameter"
    if model.shapes.kept and not (config.adapter.decomposes or config.adapter.for_nf4):
        if search.machine.usable_bytes is not None:
            return ["keep", "nf4"], None
        return ["keep"], f"{model.name} is shipped in {model.shapes.kept_formats}, which is kept"
    only_nf4 = {
        f"{model.name} is in NF4 already": quantization_method(model.settings, model.name) == BNB_NF4,
        "the adapter starts from the quantization error of NF4": config.adapter.for_nf4,
        f"quant.dense_layers={config.quant.dense_layers} needs quantized weights": config.quant.dense_layers != 0,
        "the GPU's memory is unknown": search.machine.usable_bytes is None,
    }
    reason = next((reason for reason, holds in only_nf4.items() if holds), None)
    return (["none", "nf4"], None) if reason is None else (["nf4"], reason)


def _of_usable(plan: Plan) -> str:
    usable = plan.machine.usable_bytes
    return size(plan.device.total) + ("" if usable is None else f" of {size(usable)}")


def _difference(before: Plan, after: Plan, reserve: float) -> str:
    """Return the effect of a change alone: the run fits, the time, or the network traffic."""
    if before.lacks(reserve) is not None and after.lacks(reserve) is None:
        return f": otherwise {size(before.device.total)}{', too close to the limit' if before.lacks() is None else ''}"
    times = before.time, after.time
    if times[0] is not None and times[1] is not None:
        ratio = times[0].seconds / times[1].seconds
        return f": {ratio:.2f}x faster" if ratio >= 1.005 else ""
    moved = before.traffic.received - after.traffic.received
    return f": {size(moved)} less to receive per step" if moved > 0 else ""


_MEANINGS: dict[tuple[str, Any], str] = {
    ("train.checkpointing", "none"): "nothing is recomputed",
    ("train.checkpointing", "selective"): "only MLPs are recomputed",
    ("train.checkpointing", "block"): "each layer is recomputed from its input",
    ("train.checkpointing", "offload"): "the layers' inputs are offloaded to host memory",
    ("train.accumulate", "step"): "saves the inputs of one micro-batch at a time",
    ("train.mlp_tile", None): "MLPs run on whole sequences",
    ("parallel.prefetch", True): "the next layer is gathered while one computes",
    ("parallel.prefetch", False): "one fewer layer is gathered at a time",
    ("parallel.offload_base", False): "the base stays on the GPUs",
    ("parallel.backend", "zero3"): "DeepSpeed shards the base",
    ("parallel.backend", "fsdp2"): "FSDP2 shards the base",
    ("parallel.shard_degree", "node"): "each node has a replica, so only gradients travel between nodes",
    ("parallel.shard_degree", 1): "each rank has a whole replica and gathers nothing",
}


def _meaning(name: str, value: Any, plan: Plan) -> str:
    """Return the effect of a setting in this plan, in words."""
    blocks, passes = plan.model.shapes.num_layers, plan.config.train.accumulation(plan.machine.ranks)
    match name:
        case "train.micro_batch":
            return f"{value:,} sequence{'s' if value > 1 else ''} at a time"
        case "train.mlp_tile" if value is not None:
            return f"MLPs run on {value:,} tokens at a time"
        case "parallel.resident_blocks":
            return f"{value} of {blocks} layers stay gathered" if value else "no layer stays gathered"
        case "train.accumulate" if value == "block":
            return f"each layer is gathered twice per step, not {2 * passes} times"
        case "quant.dense_layers" if isinstance(value, int):
            if value:
                return f"{value} of {blocks} layers have a dense copy of their weights, and dequantize nothing"
            shards = plan.config.shard_degree(plan.machine.ranks) > 1 and plan.config.parallel.backend == "zero3"
            return f"no layer has a dense copy of its weights{', which needs parallel=fsdp2' if shards else ''}"
        case "parallel.offload_base" if value:
            return f"the base is offloaded to host memory ({size(plan.host.machine)} per node in all)"
        case "parallel.shard_degree" if value is None:
            return f"one replica of the base is sharded over all {plan.machine.ranks:,} ranks"
        case "parallel.expert_degree" if value != 1:
            ranks = plan.work.expert_degree
            return f"{ranks} ranks divide the experts and exchange tokens, instead of gathering all experts"
        case "parallel.expert_degree":
            return "every rank gathers all experts"
    return _MEANINGS[name, value]
