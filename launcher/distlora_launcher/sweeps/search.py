"""What a sweep tries next, given what came of its trials so far.

A search is a function of the records and keeps nothing: each worker has its own, and a sweep that goes on after a kill
makes a new one.
"""

from __future__ import annotations

import enum
import importlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from distlora.config import require
from distlora.run_folder.sweep import TrialRecord
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.space import Dimension, Interval, cells, count_cells, is_finite

MOST_SHUFFLED = 100_000
"""Combinations of a finite space that `random` draws from without putting any back; of more it draws freely."""


class Due(enum.Enum):
    """What is due where it is no list of trials."""

    SAMPLE = "sample"
    """One whose values Optuna draws from the space."""
    WAIT = "wait"
    """What a trial that runs will tell decides it."""
    END = "end"
    """Nothing, ever."""


class Search(Protocol):
    """A method of a sweep."""

    words: tuple[str, ...]
    """Settings of every trial, which the user's own overrule."""

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | Due:
        """The values of trials that are due now, in their order, beside those in `trials`, none of which waits."""
        ...

    def conclusion(self, trials: Sequence[TrialRecord]) -> list[str]:
        """What is to be said under the table of results, in lines of Markdown."""
        ...

    def figures(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        """The same for programs, in values of JSON: SWEEP/conclusion.json; empty where there is nothing."""
        ...


class Cells:
    """Combinations in a fixed order, which are all known before the first trial."""

    words: tuple[str, ...] = ()

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def all(self) -> Iterator[dict[str, Any]]:
        """The combinations, in the order in which they are tried."""
        settings = self._sweep.settings
        if settings.method == "grid":
            found = cells(self._sweep.space)
        else:
            shuffled = list(cells(self._sweep.space))
            random.Random(settings.seed).shuffle(shuffled)
            found = iter(shuffled)
        return itertools.islice(found, settings.trials)

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | Due:
        return list(itertools.islice(self.all(), len(trials), None)) or Due.END

    def conclusion(self, trials: Sequence[TrialRecord]) -> list[str]:
        return []

    def figures(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        return {}


class Sampled:
    """As many trials as are asked for, with values that Optuna draws or proposes."""

    words: tuple[str, ...] = ()

    def __init__(self, sweep: Sweep) -> None:
        trials = sweep.settings.trials
        assert trials is not None, "search_of asks for it"
        self._trials = min(trials, count_cells(sweep.space)) if is_finite(sweep.space) else trials

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | Due:
        return Due.SAMPLE if len(trials) < self._trials else Due.END

    def conclusion(self, trials: Sequence[TrialRecord]) -> list[str]:
        return []

    def figures(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        return {}


def search_of(sweep: Sweep) -> Search:
    """The search of a sweep. Raises UserError for a space that its method cannot search."""
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
            f"sweep=grid tries every value, and {name} is an interval; write some of them, {name}=a,b, or set "
            "sweep=random",
        )
        return Cells(sweep)
    if settings.method == "random" and is_finite(space) and count_cells(space) <= MOST_SHUFFLED:
        return Cells(sweep)
    require(
        not (settings.method == "optuna" and settings.sampler == "cmaes" and not _is_numbers(space)),
        "sweep.sampler=cmaes proposes numbers alone, from intervals; give each setting one, as in "
        "optim.lr='interval(1e-5,1e-3)', or set sweep.sampler=tpe",
    )
    require(
        settings.trials is not None,
        f"sweep.trials=null has no end with sweep={settings.method}; set sweep.trials=20",
    )
    return Sampled(sweep)


def _is_numbers(space: Sequence[Dimension]) -> bool:
    return all(isinstance(dimension, Interval) for dimension in space)
