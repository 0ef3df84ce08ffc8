"""Sources of settings: what a study tries next.

A source is a function of the trial records and keeps no state: each worker has one, and a resumed study makes a new
one.
"""

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
from distlora_launcher.studies.sweep import Dimension, Interval, Sweep, cells, count_cells, is_finite


class NextAction(enum.Enum):
    """The source's next action, if not a list of trials."""

    SAMPLE = "sample"
    """A trial whose values `Source.draw` returns."""
    WAIT = "wait"
    """Nothing until a running trial ends."""
    END = "end"
    """Nothing any more."""


class Source(abc.ABC):
    """A source of settings for the trials of a study."""

    overrides: tuple[str, ...] = ()
    """Settings of every trial, which the user's overrides replace."""
    draws: bool = False
    """True if Optuna draws the values."""

    @abc.abstractmethod
    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | NextAction:
        """Return the values of the trials due now, in order, given all trials so far, none of which waits."""

    def draw(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        """Return the values of the next trial, if `draws`."""
        raise NotImplementedError

    def conclusion(self, trials: Sequence[TrialRecord]) -> list[str]:
        """Return lines of Markdown to print under the table of results."""
        return []

    def figures(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        """Return the conclusion as JSON values for SWEEP/conclusion.json; empty if there is none."""
        return {}


class Listed(Source):
    """Combinations in a fixed order, all known before the first trial: a grid, or a shuffled one."""

    def __init__(self, settings: SweepConfig, space: Sequence[Dimension]) -> None:
        self._settings, self._space = settings, space

    def all(self) -> Iterator[Mapping[str, Any]]:
        """Yield the combinations in the order in which they are tried."""
        combinations = cells(self._space)
        if self._settings.method == "random":
            shuffled = list(combinations)
            random.Random(self._settings.seed).shuffle(shuffled)
            combinations = iter(shuffled)
        return itertools.islice(combinations, self._settings.trials)

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | NextAction:
        """Return what is due (Source.next)."""
        return list(itertools.islice(self.all(), len(trials), None)) or NextAction.END


class DrawnSource(Source):
    """`sweep.trials` trials, with values that Optuna draws or proposes (optuna_draws.py)."""

    draws = True

    def __init__(self, settings: SweepConfig, space: Sequence[Dimension]) -> None:
        assert settings.trials is not None, "make_source asks for it"
        self._settings, self._space = settings, space
        self._trials = min(settings.trials, count_cells(space)) if is_finite(space) else settings.trials

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | NextAction:
        """Return what is due (Source.next)."""
        return NextAction.SAMPLE if len(trials) < self._trials else NextAction.END

    def draw(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        """Return the values of the next trial."""
        from distlora_launcher.studies.optuna_draws import draw

        return draw(self._settings, self._space, trials)


MOST_SHUFFLED = 100_000
"""Largest finite space that `random` draws from without replacement."""

PACKAGES = {"gp": "scipy", "cmaes": "cmaes"}
"""Packages that samplers need beside Optuna."""


def make_source(sweep: Sweep) -> Source:
    """Return what a sweep tries. Raises UserError for a space that its method cannot search."""
    settings, space = sweep.settings, sweep.space
    if settings.method == "rank_search":
        rank_search: Source = importlib.import_module("distlora_launcher.studies.rank_search").RankSearch(sweep)
        return rank_search
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
        return Listed(settings, space)
    if settings.method == "random" and is_finite(space) and count_cells(space) <= MOST_SHUFFLED:
        return Listed(settings, space)
    require(
        settings.method != "optuna" or settings.sampler != "cmaes" or all(isinstance(each, Interval) for each in space),
        "sweep.sampler=cmaes proposes numbers from intervals only; give each setting one, as in "
        "optim.lr='interval(1e-5,1e-3)', or set sweep.sampler=tpe",
    )
    require(
        settings.trials is not None,
        f"sweep.trials=null never ends with sweep={settings.method}; set sweep.trials=20",
    )
    return DrawnSource(settings, space)


def check_optuna(settings: SweepConfig, source: Source) -> None:
    """Refuse a sweep whose trials Optuna draws or prunes without Optuna, or without the package of its sampler."""
    if not source.draws and settings.pruner == "none":
        return
    require(
        importlib.util.find_spec("optuna") is not None,
        f"sweep={settings.method} with sweep.pruner={settings.pruner} needs optuna, which is not installed; pip "
        "install 'distlora[sweep]'",
    )
    package = PACKAGES.get(settings.sampler) if settings.method == "optuna" else None
    require(
        package is None or importlib.util.find_spec(package) is not None,
        f"sweep.sampler={settings.sampler} needs {package}, which is not installed; `pip install {package}`, or set "
        "sweep.sampler=tpe",
    )
