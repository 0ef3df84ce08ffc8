"""Find how many trials of a sweep fit on one base together, and their cost beside one trial. Imports no torch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from distlora.planner import Plan, plan_of
from distlora.planner.choice.search import RESERVE, has_room
from distlora.planner.memory import Kind

MOST = 64
"""Most trials that are planned together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Plans of equal trials that are trained together."""

    alone: Plan
    plan: Plan
    """Plan of all trials together."""
    trials: int
    requested: int | Literal["auto"]
    """Value of sweep.packed."""
    most: int | None
    """Most trials that fit, up to MOST; None if the available memory is unknown."""
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
                "gathered": alone.wire.gathered,
            },
            "steps_of_one_trial": self.ratio,
            "one_more": None if beyond is None else {"total": beyond.device.total, "takes_most_of": self.binds},
        }


def packing(one: Plan, requested: int | Literal["auto"], *, most: int = MOST) -> Packing:
    """Plan the requested number of trials like the one of a plan, or as many as fit.

    `auto` leaves RESERVE free, and means 1 if the available memory is unknown. `most` bounds the number.
    """

    @functools.cache
    def together(number: int) -> Plan:
        return plan_of(one.config, one.model, one.machine, trials=[one.work] * number)

    fit = None if one.machine.usable_bytes is None else _most(lambda number: has_room(together(number)), most)
    if requested != "auto":
        trials = requested
    else:
        trials = 1 if fit is None else max(1, _most(lambda number: has_room(together(number), RESERVE), most))
    beyond = together(fit + 1) if fit is not None and fit < most else None
    return Packing(
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
