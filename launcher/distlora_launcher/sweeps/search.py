"""Decide what a sweep tries next, given its trials so far.

A search is a function of the trial records and keeps no state: each worker has one, and a resumed sweep makes a new
one.
"""

from __future__ import annotations

import abc
import enum
import importlib
import importlib.util
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distlora.config import require
from distlora.config.sweep import SweepConfig
from distlora.run_folder.sweep import TrialRecord
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.space import Interval, cells, count_cells, is_finite

MOST_SHUFFLED = 100_000
"""Largest finite space that `random` draws from without replacement."""

PACKAGES = {"gp": "scipy", "cmaes": "cmaes"}
"""Packages that samplers need beside Optuna."""


class Due(enum.Enum):
    """The search's next action, if not a list of trials."""

    SAMPLE = "sample"
    """A trial whose values Optuna draws from the space."""
    WAIT = "wait"
    """Nothing until a running trial ends."""
    END = "end"
    """Nothing any more."""


class Search(abc.ABC):
    """A method of a sweep."""

    overrides: tuple[str, ...] = ()
    """Settings of every trial, which the user's overrides replace."""

    @abc.abstractmethod
    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | Due:
        """Return the values of the trials due now, in order, given all trials so far, none of which waits."""

    def conclusion(self, trials: Sequence[TrialRecord]) -> list[str]:
        """Return lines of Markdown to print under the table of results."""
        return []

    def figures(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        """Return the conclusion as JSON values for SWEEP/conclusion.json; empty if there is none."""
        return {}


class Cells(Search):
    """Combinations in a fixed order, all known before the first trial."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def all(self) -> Iterator[dict[str, Any]]:
        """Yield the combinations in the order in which they are tried."""
        settings = self._sweep.settings
        if settings.method == "grid":
            found = cells(self._sweep.space)
        else:
            shuffled = list(cells(self._sweep.space))
            random.Random(settings.seed).shuffle(shuffled)
            found = iter(shuffled)
        return itertools.islice(found, settings.trials)

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | Due:
        """Return what is due (Search.next)."""
        return list(itertools.islice(self.all(), len(trials), None)) or Due.END


class Sampled(Search):
    """`sweep.trials` trials, with values that Optuna draws or proposes."""

    def __init__(self, sweep: Sweep) -> None:
        trials = sweep.settings.trials
        assert trials is not None, "make_search asks for it"
        self._trials = min(trials, count_cells(sweep.space)) if is_finite(sweep.space) else trials

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | Due:
        """Return what is due (Search.next)."""
        return Due.SAMPLE if len(trials) < self._trials else Due.END


def make_search(sweep: Sweep) -> Search:
    """Return the search of a sweep. Raises UserError for a space that its method cannot search."""
    settings, space = sweep.settings, sweep.space
    if settings.method == "rank_search":
        found: Search = importlib.import_module("distlora_launcher.sweeps.rank_search").RankSearch(sweep)
        return found
    require(
        len(space) > 0,
        f"sweep={settings.method} has nothing to search; give a setting several values: optim.lr=1e-4,2e-4"
        + ("" if settings.method == "grid" else ", or an interval: optim.lr='tag(log,interval(1e-5,1e-3))'"),
    )
    if settings.method == "grid":
        endless = next((dimension for dimension in space if isinstance(dimension, Interval)), None)
        name = "" if endless is None else endless.setting
        require(
            endless is None,
            f"sweep=grid tries every value, and {name} is an interval; list values ({name}=a,b), or set sweep=random",
        )
        return Cells(sweep)
    if settings.method == "random" and is_finite(space) and count_cells(space) <= MOST_SHUFFLED:
        return Cells(sweep)
    require(
        settings.method != "optuna" or settings.sampler != "cmaes" or all(isinstance(each, Interval) for each in space),
        "sweep.sampler=cmaes proposes numbers from intervals only; give each setting one, as in "
        "optim.lr='interval(1e-5,1e-3)', or set sweep.sampler=tpe",
    )
    require(
        settings.trials is not None,
        f"sweep.trials=null never ends with sweep={settings.method}; set sweep.trials=20",
    )
    return Sampled(sweep)


def check_optuna() -> None:
    """Refuse a sweep without Optuna, whose journal keeps the trials of every method."""
    require(
        importlib.util.find_spec("optuna") is not None,
        "`distlora sweep` needs optuna, which is not installed; pip install 'distlora[sweep]'",
    )


def check_sampler(settings: SweepConfig) -> None:
    """Refuse a sampler whose package is missing."""
    package = PACKAGES.get(settings.sampler) if settings.method == "optuna" else None
    require(
        package is None or importlib.util.find_spec(package) is not None,
        f"sweep.sampler={settings.sampler} needs {package}, which is not installed; `pip install {package}`, or set "
        "sweep.sampler=tpe",
    )
