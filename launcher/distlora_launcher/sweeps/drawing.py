"""What Optuna draws and proposes of a space, and whom it prunes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from distlora.config import require
from distlora.config.sweep import SweepConfig
from distlora_launcher.sweeps.space import Dimension, Interval, Values, cells, is_finite

MOST_STARTUP_TRIALS = 5
"""Finished trials before the median prunes; Optuna's default. Of short sweeps a quarter of the trials."""

PROPOSALS = 10
"""Questions to Optuna for a combination of a finite space that was not tried."""

PACKAGES = {"gp": "scipy", "cmaes": "cmaes"}
"""What a sampler needs beside Optuna, which imports it with the first proposal."""


def draw(
    settings: SweepConfig,
    space: Mapping[str, Dimension],
    study: optuna.Study,
    tried: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The values of the next trial, without a trace in the study. Of a finite space nothing twice: the first of some
    proposals that is new, else the first combination that is."""
    trial = optuna.trial.create_trial(state=TrialState.RUNNING)
    trial.number = len(tried)
    kinds = {name: distribution(dimension) for name, dimension in space.items()}
    finite = is_finite(tuple(space.values()))
    for attempt in range(PROPOSALS if finite else 1):
        sampler = sampler_of(settings, len(tried), attempt)
        together = sampler.infer_relative_search_space(study, trial)
        found = sampler.sample_relative(study, trial, together)
        for name, kind in kinds.items():
            if name not in found:
                found[name] = sampler.sample_independent(study, trial, name, kind)
        values = {name: chosen(space[name], found[name]) for name in kinds}
        if values not in tried or not finite:
            return values
    return next(values for values in cells(tuple(space.values())) if values not in tried)


def distribution(dimension: Dimension) -> BaseDistribution:
    """A setting for Optuna: whole numbers at equal distances are numbers, other values have no order."""
    if isinstance(dimension, Interval):
        if dimension.integer:
            return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    values = dimension.values
    whole = all(type(value) is int for value in values)
    steps = {b - a for a, b in itertools.pairwise(values)} if whole else set()
    if len(steps) == 1 and min(steps) > 0:
        return IntDistribution(values[0], values[-1], step=steps.pop())
    return CategoricalDistribution([choice_of(dimension, value) for value in values])


def choice_of(dimension: Dimension, value: Any) -> Any:
    """A value as Optuna's journal can hold it: lists and mappings as text."""
    return json.dumps(value) if isinstance(dimension, Values) and isinstance(value, (list, dict)) else value


def chosen(dimension: Dimension, choice: Any) -> Any:
    """The value that `choice_of` made a choice of."""
    if isinstance(dimension, Values):
        return next(value for value in dimension.values if choice_of(dimension, value) == choice)
    return choice


def sampler_of(settings: SweepConfig, number: int, attempt: int = 0) -> BaseSampler:
    """What draws trial `number`, with a seed of its own."""
    seed = random.Random(f"{settings.seed}/{number}/{attempt}").randrange(2**32)
    if settings.method == "random":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of what Optuna calls experimental.
        if settings.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        if settings.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        # The liar counts trials that still run as bad ones, so that workers do not all propose the same.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=settings.workers > 1 or settings.packed != 1)


def pruner_of(settings: SweepConfig) -> optuna.pruners.BasePruner:
    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    quarter = MOST_STARTUP_TRIALS if settings.trials is None else max(1, settings.trials // 4)
    return optuna.pruners.MedianPruner(n_startup_trials=min(MOST_STARTUP_TRIALS, quarter))


def check_sampler(settings: SweepConfig) -> None:
    """Refuse a sampler whose package is missing."""
    package = PACKAGES.get(settings.sampler) if settings.method == "optuna" else None
    require(
        package is None or importlib.util.find_spec(package) is not None,
        f"sweep.sampler={settings.sampler} needs {package}, which is not installed; `pip install {package}`, or set "
        "sweep.sampler=tpe",
    )
