"""The fastest settings that fit. Imports no torch.

The search is exact over the space of `space.py`: where the base lies and over how many ranks it is cut, then each
combination of how a step runs, then as many resident blocks as fit. A branch whose base alone does not fit ends at its
first plan. Results do not depend on what is chosen, but for quant.method: 16 bits where they fit on the cards, NF4
where not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from distlora.config import Config
from distlora.config.plan import CHOSEN
from distlora.plan import Plan, plan_of
from distlora.plan.kinds import Kind
from distlora.plan.machine import Machine
from distlora.plan.model import PlannedModel
from distlora.plan.reasons import Change, changes_of, why_quantized
from distlora.plan.space import (
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

RESERVE = 0.05
"""Share of what a chosen plan needs that stays free beside it: as far as measured peaks may be from plans."""
WORTH = 0.01
"""Share of the fastest step's time that no setting is changed for."""
_OF_A_BRANCH: tuple[Kind, ...] = ("codes", "scales", "weights", "embeddings", "norms", "adapters", "optimizer")
"""What a rank holds however a step runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    config: Config
    """Without an `auto` in quant.method."""
    plan: Plan
    asked: Config
    """The settings as they were said."""
    fixed: frozenset[str] = frozenset(CHOSEN)
    reserve: float = RESERVE
    own: str | None = None
    """Why quant=auto could become nothing else."""

    @property
    def changes(self) -> tuple[Change, ...]:
        """What was chosen, and why: a plan is made without each, and where 16 bits were taken all plans in NF4."""
        method = self.config.quant.method
        said = with_settings(self.asked, {"quant.method": method})
        changes = changes_of(said, self.plan, self.reserve)
        if self.asked.quant.method != "auto":
            return changes
        nf4 = None
        if method == "none" and self.own is None and self.plan.time is not None:
            said = with_settings(self.asked, {"quant.method": "nf4"})
            nf4 = fastest(said, self.fixed, self.plan.model, self.plan.machine, self.reserve)
        return why_quantized(self.plan, self.own, nf4), *changes


def choose(
    config: Config, fixed: Collection[str], model: PlannedModel, machine: Machine, *, reserve: float = RESERVE
) -> Choice:
    """The run with every setting of CHOSEN that is not `fixed` (dotted names) set to what makes it fastest, within the
    memory that there is less `reserve`; quant.method is chosen only where it is `auto`.

    Among steps whose time is the same within WORTH it is the one with the fewest changes. Where no rates are known:
    the one that recomputes least, then has the least traffic. Where nothing fits, or it is not known what does, the
    settings stay as they are, with quant=nf4 for auto: `nearest` says what would.
    """
    methods, own = quantizations(config, model, machine)
    chosen = None
    for method in methods:
        said = with_settings(config, {"quant.method": method})
        # 16 bits are worth it where they lie on the cards; with every block from the host NF4 is a quarter of it.
        held = {*fixed, "parallel.offload_base"} if method == "none" and len(methods) > 1 else fixed
        chosen = None if machine.usable_bytes is None else fastest(said, held, model, machine, reserve)
        if chosen is not None:
            break
    plan = plan_of(said, model, machine) if chosen is None else chosen
    return Choice(config=plan.config, plan=plan, asked=config, fixed=frozenset(fixed), reserve=reserve, own=own)


def resolve_quantization(config: Config, model: PlannedModel, machine: Machine, *, reserve: float = RESERVE) -> Choice:
    """`choose` of quant.method alone: every other setting stays as it is."""
    return choose(config, CHOSEN, model, machine, reserve=reserve)


def quantizations(config: Config, model: PlannedModel, machine: Machine) -> tuple[list[str], str | None]:
    """(values of quant.method in the order in which they are tried, why there is but one where it was `auto`)."""
    if config.quant.method != "auto":
        return [config.quant.method], None
    own = own_quantization(config, model)
    if own is not None:
        return [own[0]], own[1]
    if machine.usable_bytes is None:
        return ["nf4"], "how much memory the card has is not known"
    return ["none", "nf4"], None


def fits(plan: Plan, reserve: float = 0.0) -> bool:
    """Whether a plan fits with `reserve` of what it needs to spare; what is not known counts as there."""
    return plan.lacks(reserve) is None


def cost_of(plan: Plan) -> tuple[float, ...]:
    """What a step costs: seconds; where the card's rates are not known, what it computes twice, then what it moves."""
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
    """The best plan of the space that fits; None where none does."""
    found = [(cost_of(plan), plan) for plan in on_cards(said, fixed, model, machine, reserve)]
    good: list[tuple[int, tuple[float, ...], Plan]] = []
    for cost, plan in sorted(found, key=lambda each: each[0]):
        if good and not is_as_good(cost, good[0][1]):
            break
        if fits(plan, reserve):
            good.append((len(changed(said, plan.config)), cost, plan))
    return min(good, key=lambda each: each[:2])[2] if good else None


def is_as_good(cost: tuple[float, ...], best: tuple[float, ...]) -> bool:
    """Whether a plan costs what the best does, within what no setting is changed for."""
    return cost == best if len(best) > 1 else cost[0] <= best[0] * (1 + WORTH)


def on_cards(
    said: Config, fixed: Collection[str], model: PlannedModel, machine: Machine, reserve: float
) -> Iterator[Plan]:
    """The plans of the space that cards hold, whatever the host does; of those that differ in resident blocks alone the
    one as said and the one with most."""
    for branch in branches(said, machine, fixed):
        for way in ways(branch, model, machine, fixed):
            for plan in with_micro_batches(branch, way, fixed, model, machine):
                if plan.lacks_device(reserve):
                    break  # Nor does it fit with more rows at once.
                yield plan
                if "parallel.resident_blocks" not in fixed and (more := with_most_resident(plan, reserve)):
                    yield more
            else:
                continue
            if base_lacks(plan, reserve):
                break


def base_lacks(plan: Plan, reserve: float) -> bool:
    """Whether what is the same however a step runs is too much for a card."""
    held = sum(nbytes for kind, nbytes in plan.device.held.items() if kind in _OF_A_BRANCH)
    return held * (1 + reserve) > (plan.machine.usable_bytes or 0)


def plans(said: Config, fixed: Collection[str], model: PlannedModel, machine: Machine) -> Iterator[Plan]:
    """Every plan of the space, with resident blocks as said."""
    for branch in branches(said, machine, fixed):
        for way in ways(branch, model, machine, fixed):
            yield from with_micro_batches(branch, way, fixed, model, machine)


def branches(said: Config, machine: Machine, fixed: Collection[str]) -> Iterator[Config]:
    """Where the base may lie, and over how many ranks it may be cut."""
    for storage in storages(said, machine, fixed):
        for copy in copies(said, machine, fixed):
            config = if_valid(said, {**storage, **copy})
            if config is not None:
                yield config


def with_micro_batches(
    branch: Config, way: Settings, fixed: Collection[str], model: PlannedModel, machine: Machine
) -> Iterator[Plan]:
    """From the fewest rows at once to the most."""
    for number in micro_batches(branch, machine, fixed):
        config = if_valid(branch, {**way, "train.micro_batch": number})
        if config is not None and not slices_for_nothing(branch, config, machine):
            yield plan_of(config, model, machine)


def with_most_resident(plan: Plan, reserve: float) -> Plan | None:
    """The same with as many blocks gathered for good as fit; None where that is no more than a fitting plan has."""
    said, best = plan.config.parallel.resident_blocks, None
    if said == "auto":
        return None
    low, high, guess = said, plan.model.shapes.num_layers, said + 1
    while low < high:
        config = if_valid(plan.config, {"parallel.resident_blocks": guess})
        if config is None:
            return None
        found = plan_of(config, plan.model, plan.machine)
        if found.lacks_device(reserve):
            high = guess - 1
            guess = (low + high + 1) // 2
        else:
            low, best = guess, found
            # Each takes as much as the last: as many as there is room for is the answer, and one more does not fit.
            taken = max(1, (found.device.total - plan.device.total) // (low - said))
            free = int((plan.machine.usable_bytes or 0) / (1 + reserve)) - found.device.total
            guess = min(max(low + free // taken, low + 1), high)
    return best
