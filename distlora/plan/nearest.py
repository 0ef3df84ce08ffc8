"""What would fit where the settings do not, and what a run that fits has room for. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distlora.cards import CARDS, Card
from distlora.config import Config
from distlora.config.plan import CHOSEN
from distlora.plan import Plan, plan_of
from distlora.plan.choose import choose, cost_of, has_room, on_cards, plans
from distlora.plan.machine import Machine
from distlora.plan.model import PlannedModel
from distlora.plan.space import RECOMPUTES, TILE, Settings, changed, if_valid, typed, value_of
from distlora.plan.words import KINDS, size

LEAST_LENGTH, LEAST_RANK = 256, 4
"""What a row and a rank are not shortened below."""
MOST_AT_ONCE = 2
"""Settings that are tried together, each with each; more are found by choosing all of them."""
MOST_RANKS = 1024
_FIXED = frozenset({"quant.method"})
"""What is not chosen where another result is not asked for."""


def _typed(settings: Settings) -> str:
    return " ".join(typed(name, value) for name, value in settings.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """Settings with which a run fits."""

    changes: int
    """What is to be changed; the base in host memory is one change, and two settings."""
    settings: Settings
    plan: Plan

    def __str__(self) -> str:
        return f"{_typed(self.settings)} ({size(self.plan.device.total)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """What would fit; all empty where nothing does."""

    same: Fitting | None
    """The fewest settings to change for the same result."""
    other: Fitting | None
    """The fewest for a result that differs (shorter rows, a smaller rank, NF4), where that is fewer."""
    ranks: int | None
    """So many such cards are enough, with settings that are chosen for them."""
    card: Card | None
    """The smallest known card of which as many are enough."""
    least: Plan | None
    """The plan that takes least, where no setting makes one fit."""

    def __str__(self) -> str:
        said = [f"set {found}" for found in (self.same, self.other) if found is not None]
        if not said:
            cards = [] if self.ranks is None else [f"{self.ranks:,} such cards"]
            cards += [] if self.card is None else [f"as many {self.card.title} (card={self.card.name})"]
            said = [f"take {found}" for found in cards]
        return ", or ".join(said) or "no number of such cards and no known card holds it"


def nearest(config: Config, model: PlannedModel, machine: Machine) -> Nearest:
    """Of settings that do not fit: the smallest change that does, whoever set what; one setting, then two, then more.

    Among changes of as many settings it is the fastest. More cards, and other ones, are looked for where no setting
    helps.
    """
    plan = plan_of(config, model, machine)
    same = _fewest(plan, moves(config, model, machine)) or _chosen(plan)
    fewer = MOST_AT_ONCE if same is None else min(MOST_AT_ONCE, same.changes - 1)
    other = _fewest(plan, [*moves(config, model, machine), *sacrifices(config, machine)], most=fewer)
    if same is not None and other is not None and other.settings == same.settings:
        other = None  # One change of two settings: DeepSpeed and what it alone can.
    if same is not None or other is not None:
        return Nearest(same=same, other=other, ranks=None, card=None, least=None)
    least = min(plans(config, _FIXED, model, machine), key=lambda plan: plan.device.total)
    return Nearest(same=None, other=None, ranks=_ranks(plan), card=_card(plan), least=least)


def moves(config: Config, model: PlannedModel, machine: Machine) -> list[Settings]:
    """Single settings that take less memory and change no result."""
    train, parallel, ranks = config.train, config.parallel, machine.ranks
    found: list[Settings] = []
    for mode in RECOMPUTES[RECOMPUTES.index(train.checkpointing) + 1 :]:
        found.append({"train.checkpointing": mode})
    rows = -(-train.global_batch // ranks)
    found += [{"train.micro_batch": n} for n in range(train.micro_batch - 1, 0, -1) if rows % n == 0]
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


def _fewest(plan: Plan, singles: Sequence[Settings], most: int = MOST_AT_ONCE) -> Fitting | None:
    """The fastest of the combinations that fit, of as few of `singles` as do."""
    for count in range(1, most + 1):
        fitting = [found for found in _tried(plan, itertools.combinations(singles, count)) if has_room(found.plan)]
        if fitting:
            return min(fitting, key=lambda found: (_given_up(plan, found.plan), cost_of(found.plan)))
    return None


def _given_up(said: Plan, found: Plan) -> tuple[float, ...]:
    """Of the length of a row, of the rank, of how many linears have an adapter."""
    before, after = said.config, found.config
    return (
        before.data.sequence_length / after.data.sequence_length,
        before.adapter.r / after.adapter.r,
        int(before.adapter.target_modules != after.adapter.target_modules),
    )


def _tried(plan: Plan, combinations: Iterable[Sequence[Settings]]) -> Iterator[Fitting]:
    for parts in combinations:
        names = [name for part in parts for name in part]
        settings = {name: value for part in parts for name, value in part.items()}
        config = if_valid(plan.config, settings) if len(settings) == len(names) else None
        if config is not None:
            yield Fitting(changes=len(parts), settings=settings, plan=plan_of(config, plan.model, plan.machine))


def _chosen(plan: Plan) -> Fitting | None:
    """The fastest that fits of all that can be chosen, less each setting that it fits without."""
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


def _ranks(plan: Plan) -> int | None:
    """The fewest such cards on which some settings fit."""
    have, each = plan.machine.ranks, max(plan.machine.ranks_per_machine, 8)
    machines = (each * 2**n for n in range(1, int(math.log2(MOST_RANKS / each)) + 1))
    for ranks in (*range(have + 1, each + 1), *machines) if plan.machine.is_gpu else ():
        cluster = {"cluster.gpus_per_node": min(ranks, each), "cluster.nodes": -(-ranks // each)}
        config = if_valid(plan.config, cluster | ({"cluster.launcher": "slurm"} if ranks > each else {}))
        machine = dataclasses.replace(plan.machine, ranks=ranks, ranks_per_machine=min(ranks, each))
        if ranks > have and config is not None and _some_fit(config, plan.model, machine):
            return ranks
    return None


def _card(plan: Plan) -> Card | None:
    """The smallest known card of which as many hold some settings."""
    for card in sorted(CARDS.values(), key=lambda card: card.usable_bytes) if plan.machine.is_gpu else ():
        machine = dataclasses.replace(plan.machine, usable_bytes=card.usable_bytes)
        if card.usable_bytes > (plan.machine.usable_bytes or 0) and _some_fit(plan.config, plan.model, machine):
            return card
    return None


def _some_fit(config: Config, model: PlannedModel, machine: Machine) -> bool:
    return any(has_room(plan) for plan in on_cards(config, {*_FIXED, "parallel.resident_blocks"}, model, machine, 0.0))


def largest(plan: Plan, count: int = 3) -> str:
    """`4-bit weights of the base 17.1 GB, ...`: what takes most at the peak."""
    kinds = sorted(plan.device.by_kind.items(), key=lambda each: -each[1])[:count]
    return ", ".join(f"{KINDS[kind]} {size(nbytes)}" for kind, nbytes in kinds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """A larger run, and what it would take."""

    what: str
    """`train.micro_batch=4`, or a model's name."""
    total: int
    """Bytes of a rank."""
    fits: bool | None

    def __str__(self) -> str:
        verdict = {True: "fits", False: "does not fit", None: "is not checked"}[self.fits]
        return f"{self.what}: {size(self.total)}, {verdict}"


def room(plan: Plan, larger: PlannedModel | None = None) -> list[Room]:
    """What the next larger micro-batch, row, rank and model (`larger`) would take, the other settings as they are."""
    config, limit = plan.config, plan.model.settings.get("max_position_embeddings")
    rows = -(-config.train.global_batch // plan.machine.ranks)
    micro = next((n for n in range(config.train.micro_batch + 1, rows + 1) if rows % n == 0), None)
    length = 2 * config.data.sequence_length
    tries: list[Settings] = [] if micro is None else [{"train.micro_batch": micro}]
    tries += [{"data.sequence_length": length}] if not isinstance(limit, int) or length <= limit else []
    tries += [{"adapter.r": 2 * config.adapter.r}] if config.adapter.method == "lora" else []
    found = [
        (_typed(settings), plan_of(config_, plan.model, plan.machine))
        for settings in tries
        if (config_ := if_valid(config, settings)) is not None
    ]
    if larger is not None:
        found.append((larger.name, plan_of(config, larger, plan.machine)))
    return [Room(what=what, total=each.device.total, fits=each.fits) for what, each in found]
