"""Find how many trials of a sweep fit on one base together, and their cost beside one trial. Imports no torch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distlora.config import Config
from distlora.planner import Plan, plan_of
from distlora.planner.choice.choose import RESERVE, has_room
from distlora.planner.machine import Machine
from distlora.planner.memory.kinds import Kind
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload

MOST = 64
"""Trials that are looked at, at the most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Trials of one kind in a pack."""

    alone: Plan
    plan: Plan
    """Of the pack."""
    trials: int
    asked: int | Literal["auto"]
    most: int | None
    """As many as fit, MOST at the most; None: it is not known what does."""
    beyond: Plan | None
    """Of one trial more than fit."""

    @property
    def ratio(self) -> float | None:
        """A step of the pack, in steps of one trial alone; None: the machine's rates are not known."""
        pack, alone = self.plan.time, self.alone.time
        return None if pack is None or alone is None else pack.seconds / alone.seconds

    @property
    def binds(self) -> Kind | None:
        """The kind of memory that each further trial takes most of; None: nothing says how much there is."""
        if self.beyond is None:
            return None
        more = Counter(self.beyond.device.by_kind)
        more.subtract(self.alone.device.by_kind)
        return max(more, key=lambda kind: more[kind])

    def as_json(self) -> dict[str, Any]:
        """Every figure, for a program to read."""
        alone, beyond = self.alone, self.beyond
        return {
            "trials": self.trials,
            "asked": self.asked,
            "most": self.most,
            "fits": self.plan.fits,
            "of_one_trial": {
                "total": alone.device.total,
                "seconds": None if alone.time is None else alone.time.seconds,
                "gathered": alone.wire.gathered,
            },
            "steps_of_one_trial": self.ratio,
            "one_more": None if beyond is None else {"total": beyond.device.total, "takes_most_of": self.binds},
        }


def packing(
    config: Config, model: PlannedModel, machine: Machine, asked: int | Literal["auto"], *, most: int = MOST
) -> Packing:
    """Plan the requested number of trials with these settings, or as many as fit.

    `auto` leaves RESERVE free, and means 1 if the available memory is unknown. `most` bounds the number.
    """
    work = Workload.of(config)

    @functools.cache
    def of(number: int) -> Plan:
        return plan_of(config, model, machine, trials=[work] * number)

    fit = None if machine.usable_bytes is None else _most(lambda number: has_room(of(number)), most)
    if asked != "auto":
        trials = asked
    else:
        trials = 1 if fit is None else max(1, _most(lambda number: has_room(of(number), RESERVE), most))
    beyond = of(fit + 1) if fit is not None and fit < most else None
    return Packing(alone=of(1), plan=of(trials), trials=trials, asked=asked, most=fit, beyond=beyond)


def _most(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, by bisection; 0 if none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = min(2 * low, (low + high) // 2) if low else 1
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest(trials: Sequence[Config], model: PlannedModel, machine: Machine) -> Config:
    """Return the trial that takes the most memory alone; trials that differ are planned as copies of it."""
    adapters = {repr(trial.adapter): trial for trial in trials}
    return max(adapters.values(), key=lambda trial: plan_of(trial, model, machine).device.total)
