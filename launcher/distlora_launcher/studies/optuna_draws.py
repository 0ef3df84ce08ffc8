"""Values that Optuna draws, its pruners and the importance of settings, by the records of the trials.

Optuna keeps nothing: each call gives it the trials anew, in memory. Each draw is seeded by sweep.seed and the trial's
number, so a resumed sweep draws the same values.
"""

import itertools
import json
import random
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial

from distlora.config.sweep import SweepConfig
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED, RUNNING, WAITING, TrialRecord
from distlora_launcher.studies.sweep import Dimension, Interval, Values, cells, is_finite

NAME = "sweep"
"""Name of the study, by which hyperband deals trials to its brackets."""

LEAST_JUDGED = 8
"""Finished trials before the importance of settings is estimated."""

MOST_STARTUP_TRIALS = 5
"""Most finished trials before the median pruner starts (Optuna's default); a quarter of sweep.trials if less."""

PROPOSALS = 10
"""Proposals that Optuna makes for an untried combination of a finite space."""

_STATES = {
    WAITING: TrialState.WAITING,
    RUNNING: TrialState.RUNNING,
    COMPLETE: TrialState.COMPLETE,
    PRUNED: TrialState.PRUNED,
    FAILED: TrialState.FAIL,
}


def study_of(settings: SweepConfig, space: Sequence[Dimension], trials: Sequence[TrialRecord]) -> optuna.Study:
    """Return the trials as a study in memory."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name=NAME, direction=settings.direction, pruner=make_pruner(settings))
    for trial in trials:
        searched = [dimension for dimension in space if dimension.setting in trial.values]
        study.add_trial(
            create_trial(
                state=_STATES[trial.state],
                value=trial.value if trial.state == COMPLETE else None,
                params={
                    dimension.setting: choice_of(dimension, trial.values[dimension.setting]) for dimension in searched
                },
                distributions={dimension.setting: distribution(dimension) for dimension in searched},
                intermediate_values=dict(trial.evaluations),
                system_attrs=dict(trial.rungs),
            )
        )
    return study


def draw(settings: SweepConfig, space: Sequence[Dimension], trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """Return the values of the next trial.

    In a finite space no combination comes twice: the first new one of PROPOSALS proposals, else the first untried one.
    """
    study, tried = study_of(settings, space, trials), [dict(trial.values) for trial in trials]
    drawn = create_trial(state=TrialState.RUNNING)
    drawn.number = len(tried)
    kinds = {dimension.setting: distribution(dimension) for dimension in space}
    finite = is_finite(space)
    for attempt in range(PROPOSALS if finite else 1):
        sampler = make_sampler(settings, len(tried), attempt)
        if isinstance(sampler, optuna.samplers.CmaEsSampler):
            choices = dict(_replayed(settings, space, trials, sampler).ask(kinds).params)
        else:
            choices = sampler.sample_relative(study, drawn, sampler.infer_relative_search_space(study, drawn))
        for name, kind in kinds.items():
            if name not in choices:
                choices[name] = sampler.sample_independent(study, drawn, name, kind)
        values = {dimension.setting: _chosen(dimension, choices[dimension.setting]) for dimension in space}
        if values not in tried or not finite:
            return values
    return next(values for values in cells(space) if values not in tried)


def judge(
    settings: SweepConfig, space: Sequence[Dimension], trials: Sequence[TrialRecord], number: int
) -> tuple[bool, dict[str, float]]:
    """Return (does the pruner end a trial after its last evaluation, TrialRecord.rungs after it)."""
    if len(trials[number].evaluations) <= settings.pruner_warmup:
        return False, dict(trials[number].rungs)
    study = study_of(settings, space, trials)
    prunes = bool(study.pruner.prune(study, study.trials[number]))  # It may be NumPy's bool.
    return prunes, dict(study.trials[number].system_attrs)


def importance(settings: SweepConfig, space: Sequence[Dimension], trials: Sequence[TrialRecord]) -> dict[str, float]:
    """Return the importance of each setting by PED-ANOVA (arXiv 2304.10255) for the best quarter; {} if unknown."""
    names = sorted(dimension.setting for dimension in space if not distribution(dimension).single())
    if sum(trial.state == COMPLETE for trial in trials) < LEAST_JUDGED or not names:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns of experimental features.
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        study = study_of(settings, space, trials)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=names)
    return dict(shares) if sum(shares.values()) > 0 else {}


def _replayed(
    settings: SweepConfig, space: Sequence[Dimension], trials: Sequence[TrialRecord], sampler: BaseSampler
) -> optuna.Study:
    """Return the completed trials as a study that was told of one after the other, which is how CMA-ES learns."""
    study = optuna.create_study(sampler=sampler, direction=settings.direction)
    complete = [trial for trial in trials if trial.state == COMPLETE]
    for trial in sorted(complete, key=lambda trial: (trial.ended or 0.0, trial.number)):
        study.enqueue_trial(dict(trial.values))
        taken = study.ask({dimension.setting: distribution(dimension) for dimension in space})
        _ = taken.relative_params  # Reading it is what updates CMA-ES's state.
        study.tell(taken, trial.value)
    return study


def distribution(dimension: Dimension) -> BaseDistribution:
    """Return a setting's distribution for Optuna: equally spaced integers are ordered, other values are not."""
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
    """Return a value as a choice of Optuna's: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(dimension, Values) and isinstance(value, (list, dict)) else value


def _chosen(dimension: Dimension, choice: Any) -> Any:
    """Return the value of a choice that `choice_of` made."""
    if isinstance(dimension, Values):
        return next(value for value in dimension.values if choice_of(dimension, value) == choice)
    return choice


def make_sampler(settings: SweepConfig, number: int, attempt: int = 0) -> BaseSampler:
    """Return the sampler of trial `number`, with a seed of its own."""
    seed = random.Random(f"{settings.seed}/{number}/{attempt}").randrange(2**32)
    if settings.method == "random":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns of experimental features.
        if settings.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed)
        if settings.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        # constant_liar counts running trials as bad ones, so that workers do not propose the same values.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=settings.workers > 1 or settings.packed != 1)


def make_pruner(settings: SweepConfig) -> optuna.pruners.BasePruner:
    """Return Optuna's pruner for the settings."""
    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    quarter = MOST_STARTUP_TRIALS if settings.trials is None else max(1, settings.trials // 4)
    return optuna.pruners.MedianPruner(n_startup_trials=min(MOST_STARTUP_TRIALS, quarter))
