"""The fastest settings that fit. Imports no torch.

The search is exact over the space of `space.py`: where the base lies and over how many ranks it is cut, then each
combination of how a step runs, then as many resident blocks as fit. A branch whose base alone does not fit ends at its
first plan. Results do not depend on what is chosen, but for quant.method: 16 bits where they fit on the GPUs and are
not far slower than NF4, NF4 where not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from distlora.config import Config
from distlora.config.plan import CHOSEN
from distlora.planner import Plan, plan_of
from distlora.planner.choice.reasons import Change, changes_of, why_quantized
from distlora.planner.choice.space import (
    RECOMPUTES,
    Settings,
    changed,
    copies,
    if_valid,
    micro_batches,
    own_quantization,
    slices_for_nothing,
    storages,
    ways,
    with_settings,
)
from distlora.planner.machine import Machine
from distlora.planner.memory.kinds import Kind
from distlora.planner.model import PlannedModel

RESERVE = 0.05
"""Share of what a chosen plan needs that stays free beside it: as far as measured peaks may be from plans."""
WORTH = 0.01
"""Share of the fastest step's time that no setting is changed for."""
TOO_SLOW = 1.5
"""16 bits are not taken where NF4's own best is so many times as fast: plans are at 0.97 to 1.34 of published speeds
(README.md), so of two plans that are less than 1.4 apart it is not known which is faster."""
_OF_A_BRANCH: tuple[Kind, ...] = ("codes", "scales", "weights", "embeddings", "norms", "adapters", "optimizer")
"""What a rank holds however a step runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The settings of a run after `plan=auto` and `quant=auto`, with its plan."""

    config: Config
    """Without an `auto` in quant.method."""
    plan: Plan
    asked: Config
    """The settings as they were said."""
    fixed: frozenset[str] = frozenset(CHOSEN)
    reserve: float = RESERVE
    own: str | None = None
    """Why quant=auto could become nothing else."""
    other: Plan | None = None
    """The fastest in what quant=auto did not become, where that fits too."""

    @property
    def changes(self) -> tuple[Change, ...]:
        """The chosen settings with reasons. Makes a plan without each of them."""
        said = with_settings(self.asked, {"quant.method": self.config.quant.method})
        changes = changes_of(said, self.plan, self.reserve)
        return (
            changes if self.asked.quant.method != "auto" else (why_quantized(self.plan, self.own, self.other), *changes)
        )


def choose(
    config: Config, fixed: Collection[str], model: PlannedModel, machine: Machine, *, reserve: float = RESERVE
) -> Choice:
    """Set every setting of CHOSEN that is not `fixed` to the value that makes the run fastest within the memory.

    `fixed` has dotted names; `reserve` is the fraction of the need that stays free. quant.method is chosen only if it
    is `auto`.

    Among steps whose times agree within WORTH, the plan with the fewest changes wins. Without known rates, the plan
    that recomputes least wins, then the one with the least traffic. If nothing fits, or the memory is unknown, the
    settings stay as they are, with quant=nf4 for auto; `nearest` finds what would fit.
    """
    methods, own = quantizations(config, model, machine)
    found: list[Plan] = []
    for method in methods if machine.usable_bytes is not None else ():
        said = with_settings(config, {"quant.method": method})
        # 16 bits are worth it where they lie on the GPUs; with every block from the host NF4 is a quarter of it.
        held = {*fixed, "parallel.offload_base"} if method == "none" and len(methods) > 1 else fixed
        plan = fastest(said, held, model, machine, reserve)
        found += [] if plan is None else [plan]
        if plan is not None and plan.time is None:
            break  # Nothing says which is faster.
    if len(found) > 1 and is_too_slow(*found):
        found.reverse()
    plan = found[0] if found else plan_of(with_settings(config, {"quant.method": methods[-1]}), model, machine)
    other = found[1] if len(found) > 1 else None
    return Choice(
        config=plan.config, plan=plan, asked=config, fixed=frozenset(fixed), reserve=reserve, own=own, other=other
    )


def resolve_quantization(config: Config, model: PlannedModel, machine: Machine, *, reserve: float = RESERVE) -> Choice:
    """Choose quant.method only, as `choose` does."""
    return choose(config, CHOSEN, model, machine, reserve=reserve)


def quantizations(config: Config, model: PlannedModel, machine: Machine) -> tuple[list[str], str | None]:
    """Return the values of quant.method to try, in order, and the reason if `auto` leaves only one."""
    if config.quant.method != "auto":
        return [config.quant.method], None
    own = own_quantization(config, model)
    if own is not None:
        return [own[0]], own[1]
    if machine.usable_bytes is None:
        return ["nf4"], "how much memory the GPU has is not known"
    return ["none", "nf4"], None


def is_too_slow(plan: Plan, other: Plan) -> bool:
    """Return True if `plan` takes more than TOO_SLOW times as long as `other`."""
    times = plan.time, other.time
    return times[0] is not None and times[1] is not None and times[0].seconds > TOO_SLOW * times[1].seconds


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
        plan.wire.received,
        RECOMPUTES.index(train.checkpointing),
        int(config.quant.method == "nf4" and not train.keep_dequantized),
        int(train.mlp_tile is not None),
        int(not config.parallel.prefetch),
        -train.micro_batch,
    )


def fastest(said: Config, fixed: Collection[str], model: PlannedModel, machine: Machine, reserve: float) -> Plan | None:
    """Return the fastest plan of the space that fits; None if none does."""
    found = [(cost_of(plan), plan) for plan in on_gpus(said, fixed, model, machine, reserve)]
    good: list[tuple[int, tuple[float, ...], Plan]] = []
    for cost, plan in sorted(found, key=lambda each: each[0]):
        if good and not is_as_good(cost, good[0][1]):
            break
        if has_room(plan, reserve):
            good.append((len(changed(said, plan.config)), cost, plan))
    return min(good, key=lambda each: each[:2])[2] if good else None


def is_as_good(cost: tuple[float, ...], best: tuple[float, ...]) -> bool:
    """Return True if a plan's cost is within WORTH of the best."""
    return cost == best if len(best) > 1 else cost[0] <= best[0] * (1 + WORTH)


def on_gpus(
    said: Config, fixed: Collection[str], model: PlannedModel, machine: Machine, reserve: float
) -> Iterator[Plan]:
    """Yield the plans of the space that fit device memory, whatever the host lacks.

    Of plans that differ only in resident blocks, yields the given number and the largest that fits.
    """
    for branch in branches(said, machine, fixed):
        yield from _of_branch(branch, fixed, model, machine, reserve)


def _of_branch(
    branch: Config, fixed: Collection[str], model: PlannedModel, machine: Machine, reserve: float
) -> Iterator[Plan]:
    # Gradients of the base are there whole from one micro-batch to the next: with more rows at once it may be less.
    may_shrink = branch.adapter.trains_base is not None
    for way in ways(branch, model, machine, fixed):
        for plan in with_micro_batches(branch, way, fixed, model, machine):
            if not lacks_device(plan, reserve):
                yield plan
                if "parallel.resident_blocks" not in fixed and (more := with_most_resident(plan, reserve)):
                    yield more
            elif base_lacks(plan, reserve):
                return
            elif not may_shrink:
                break


def lacks_device(plan: Plan, reserve: float) -> bool:
    """Return True if the memory in which the model is trained is too small: a GPU's, or a CPU node's."""
    return plan.lacks_device(reserve) if plan.machine.is_gpu else not has_room(plan, reserve)


def base_lacks(plan: Plan, reserve: float) -> bool:
    """Return True if the part of the need that no setting of a step changes is too large."""
    held = sum(nbytes for kind, nbytes in plan.device.held.items() if kind in _OF_A_BRANCH)
    return held * (1 + reserve) > (plan.machine.usable_bytes or 0)


def plans(said: Config, fixed: Collection[str], model: PlannedModel, machine: Machine) -> Iterator[Plan]:
    """Every plan of the space, with resident blocks as said."""
    for branch in branches(said, machine, fixed):
        for way in ways(branch, model, machine, fixed):
            yield from with_micro_batches(branch, way, fixed, model, machine)


def branches(said: Config, machine: Machine, fixed: Collection[str]) -> Iterator[Config]:
    """Yield the places that the base may be in and the numbers of ranks that it may be sharded over."""
    for storage in storages(said, machine, fixed):
        for copy in copies(said, machine, fixed):
            config = if_valid(said, {**storage, **copy})
            if config is not None:
                yield config


def with_micro_batches(
    branch: Config, way: Settings, fixed: Collection[str], model: PlannedModel, machine: Machine
) -> Iterator[Plan]:
    """Yield plans from the smallest micro-batch to the largest."""
    for number in micro_batches(branch, machine, fixed):
        config = if_valid(branch, {**way, "train.micro_batch": number})
        if config is not None and not slices_for_nothing(branch, config, machine):
            yield plan_of(config, model, machine)


def with_most_resident(plan: Plan, reserve: float) -> Plan | None:
    """Return the plan with as many resident blocks as fit; None if that is not more than `plan` has."""
    said, best = plan.config.parallel.resident_blocks, None
    if said == "auto":
        return None
    low, high, guess = said, plan.model.shapes.num_layers, said + 1
    while low < high:
        config = if_valid(plan.config, {"parallel.resident_blocks": guess})
        if config is None:
            return None
        found = plan_of(config, plan.model, plan.machine)
        if lacks_device(found, reserve):
            high = guess - 1
            guess = (low + high + 1) // 2
        else:
            low, best = guess, found
            # Each takes as much as the last: as many as there is room for is the answer, and one more does not fit.
            taken = max(1, (found.device.total - plan.device.total) // (low - said))
            free = int((plan.machine.usable_bytes or 0) / (1 + reserve)) - found.device.total
            guess = min(max(low + free // taken, low + 1), high)
    return best
