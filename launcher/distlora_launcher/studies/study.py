"""Keep the trials of a sweep in Optuna's journal: which worker has which, and their results.

All workers append to SWEEP/journal.log. A worker that takes a trial or records a result holds SWEEP/.lock (flock,
released with its process), so no two workers take the same trial. Each draw is seeded by sweep.seed and the trial's
number, so a resumed sweep draws the same values.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distlora.config import UserError
from distlora.config.sweep import SweepConfig
from distlora.run_folder.sweep import (
    COMPLETE,
    FAILED,
    JOURNAL_NAME,
    PRUNED,
    RUNNING,
    SAVED,
    WAITING,
    TrialRecord,
    write_importance,
    write_results,
)
from distlora_launcher.launch.lock import holders, is_alive
from distlora_launcher.launch.processes import Process, this_process
from distlora_launcher.studies.runner import Outcome, Trial
from distlora_launcher.studies.sweep import (
    Dimension,
    Due,
    Interval,
    Search,
    Sweep,
    Values,
    cells,
    check_sampler,
    is_finite,
)
from distlora_launcher.terminal.output import warn

NAME = "sweep"

COORDINATES_NAME, IMPORTANCE_NAME = "parallel_coordinates.png", "importance.png"

LEAST_JUDGED = 8
"""Finished trials before the importance of settings is estimated."""

_STATES = {
    TrialState.WAITING: WAITING,
    TrialState.RUNNING: RUNNING,
    TrialState.COMPLETE: COMPLETE,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
}


class Study:
    """The trials of a sweep, as one worker sees them."""

    def __init__(self, sweep: Sweep, search: Search, *, place: str | None = None) -> None:
        """Open the journal, or create it. `place`: name of this worker (`worker_place`)."""
        self._sweep, self._search, self._place = sweep, search, place
        check_sampler(sweep.settings)  # A sweep may be resumed on another machine.
        self._space = {dimension.setting: dimension for dimension in sweep.space}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with locked(self._sweep.folder):
            storage = open_journal(sweep.folder)
            if not storage.get_all_studies():
                optuna.create_study(storage=storage, study_name=NAME, direction=sweep.settings.direction)
            self._study = optuna.load_study(storage=storage, study_name=NAME, pruner=make_pruner(sweep.settings))

    def ask(self) -> Trial | Due:
        """Take a trial for this process: an abandoned one, a waiting one, or the next of the search."""
        with locked(self._sweep.folder):
            left, is_busy = self._next_abandoned()
            if left is not None:
                self._claim(left)
                return self._as_trial(left, begun=True)
            if not self._trials(TrialState.WAITING):
                due = self._search.next(self.records())
                if due is Due.SAMPLE:
                    self._draw()
                elif isinstance(due, Due):
                    return Due.WAIT if is_busy else due
                else:
                    for values in due:
                        self._enqueue(values)
            taken = self._take(self._trials(TrialState.WAITING)[0])
            self._write()
            return self._as_trial(taken, begun=False)

    def enqueue(self) -> None:
        """Record the trials that are known now, so that `status` shows them as waiting."""
        with locked(self._sweep.folder):
            records = self.records()
            due = Due.WAIT if any(record.state == WAITING for record in records) else self._search.next(records)
            for values in due if not isinstance(due, Due) else ():
                self._enqueue(values)
            self._write()

    def report(self, number: int, step: int, value: float) -> None:
        """Record an evaluation of a trial."""
        with locked(self._sweep.folder):
            frozen = self._trial(number)
            if self._has_claimed(frozen) and step not in frozen.intermediate_values:
                optuna.trial.Trial(self._study, frozen._trial_id).report(value, step)
                self._write()

    def should_prune(self, number: int) -> bool:
        """Return whether the pruner ends a trial after its last evaluation."""
        frozen = self._trial(number)
        if len(frozen.intermediate_values) <= self._sweep.settings.pruner_warmup:
            return False
        return bool(self._study.pruner.prune(self._study, frozen))  # It may be NumPy's bool.

    def tell(self, outcome: Outcome, value: float | None, figures: Mapping[str, Any]) -> None:
        """Record how a trial ended: its value, and the `figures` of TrialRecord that its run reports."""
        with locked(self._sweep.folder):
            frozen = self._trial(outcome.number)
            if not self._has_claimed(frozen):
                warn(f"trial {outcome.number} was taken over by another worker; the result of this worker is dropped")
                return
            seconds = frozen.user_attrs.get("seconds", 0.0) + outcome.seconds
            self._set(frozen, seconds=seconds, step=outcome.step, owner=None, **figures)
            if outcome.reason is not None:
                self._set(frozen, reason=outcome.reason)
            states = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}
            if outcome.state != SAVED:
                self._study.tell(
                    outcome.number, value if outcome.state == COMPLETE else None, state=states[outcome.state]
                )
            self._write()

    def records(self) -> list[TrialRecord]:
        """Return all trials, by number."""
        return [_record(trial) for trial in self._study.get_trials(deepcopy=False)]

    def is_over(self) -> bool:
        """Return whether nothing runs, waits, or is due."""
        with locked(self._sweep.folder):
            records = self.records()
            return not any(record.is_open for record in records) and self._search.next(records) is Due.END

    def write_plots(self) -> None:
        """Write SWEEP/parallel_coordinates.png, importance.png and importance.json if there is something to show.

        The importance of settings is by PED-ANOVA (arXiv 2304.10255) for the best quarter of trials.
        """
        os.environ.setdefault("MPLBACKEND", "Agg")
        from matplotlib import pyplot
        from optuna.visualization import matplotlib as plots

        folder, complete = self._sweep.folder, self._trials(TrialState.COMPLETE)
        names = {name for trial in complete for name, kind in trial.distributions.items() if not kind.single()}
        if len(complete) < 2 or not names:
            return
        options: dict[str, Any] = {"params": sorted(names), "target_name": self._sweep.settings.metric}
        with locked(self._sweep.folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns of experimental features.
            plots.plot_parallel_coordinate(self._study, **options)
            pyplot.savefig(folder / COORDINATES_NAME, bbox_inches="tight")
            if len(complete) < LEAST_JUDGED:
                return
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            shares = optuna.importance.get_param_importances(self._study, evaluator=evaluator, params=sorted(names))
            if sum(shares.values()) > 0:
                plots.plot_param_importances(self._study, evaluator=evaluator, **options)
                pyplot.savefig(folder / IMPORTANCE_NAME, bbox_inches="tight")
                write_importance(folder, shares, "PED-ANOVA, the best quarter")

    def _write(self) -> None:
        write_results(self._sweep.folder, self.records())

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _trial(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _set(self, trial: FrozenTrial, **values: Any) -> None:
        for name, value in values.items():
            self._study._storage.set_trial_user_attr(trial._trial_id, name, value)

    def _next_abandoned(self) -> tuple[FrozenTrial | None, bool]:
        """Return the first trial whose worker is dead, and whether a user resumes one by hand.

        The latter is left to the user until that run ends.
        """
        running = self._trials(TrialState.RUNNING)
        is_busy = False
        for trial in running:
            owner, place = trial.user_attrs.get("owner"), trial.user_attrs.get("place")
            if owner is not None and is_alive(self._sweep.folder, place, Process(**owner)):
                continue
            if "values" not in trial.user_attrs:
                self._set(trial, reason="its worker was killed before it had values")
                self._study.tell(trial.number, state=TrialState.FAIL)
                self._write()
            elif holders(self._sweep.run_dir(trial.number)):
                is_busy = True
            else:
                return trial, is_busy
        return None, is_busy

    def _as_trial(self, trial: FrozenTrial, *, begun: bool) -> Trial:
        values = _values(self._trial(trial.number))
        return Trial(
            number=trial.number,
            values=values,
            overrides=tuple(self._sweep.trial_overrides(trial.number, values, self._search.overrides)),
            run_dir=self._sweep.run_dir(trial.number),
            begun=begun,
        )

    def _enqueue(self, values: Mapping[str, Any]) -> None:
        params = {name: choice_of(self._space[name], value) for name, value in values.items() if name in self._space}
        self._study.enqueue_trial(params, user_attrs={"values": dict(values)})

    def _draw(self) -> None:
        """Have Optuna draw the next trial, which then waits with its values.

        It is one line of the journal, so that a kill leaves all of it or nothing.
        """
        tried = [_values(trial) for trial in self._study.get_trials(deepcopy=False)]
        self._enqueue(draw(self._sweep.settings, self._space, self._study, tried))

    def _take(self, waiting: FrozenTrial) -> FrozenTrial:
        """Take a waiting trial for this process."""
        names = waiting.system_attrs["fixed_params"]
        trial = self._study.ask({name: distribution(self._space[name]) for name in names})
        frozen = self._trial(trial.number)
        self._claim(frozen)
        return frozen

    def _claim(self, trial: FrozenTrial) -> None:
        self._set(trial, owner=dataclasses.asdict(this_process()), place=self._place)

    @staticmethod
    def _has_claimed(trial: FrozenTrial) -> bool:
        """Return whether this process still has a trial: another may have taken it when locks were lost (NFS)."""
        return trial.state == TrialState.RUNNING and trial.user_attrs.get("owner") == dataclasses.asdict(this_process())


def _values(trial: FrozenTrial) -> dict[str, Any]:
    values: dict[str, Any] = trial.user_attrs.get("values", {})
    return values


def _record(trial: FrozenTrial) -> TrialRecord:
    state, attributes = _STATES[trial.state], trial.user_attrs
    evaluations = dict(sorted(trial.intermediate_values.items()))
    last = max(evaluations, default=None)
    value = trial.value if state == COMPLETE else None if last is None or state == FAILED else evaluations[last]
    return TrialRecord(
        number=trial.number,
        state=state,
        values=_values(trial),
        value=value,
        step=attributes.get("step", last),
        reason=attributes.get("reason"),
        seconds=attributes.get("seconds"),
        trainable_parameters=attributes.get("trainable_parameters"),
        peak_memory_bytes=attributes.get("peak_memory_bytes"),
        evaluations=evaluations,
    )


MOST_STARTUP_TRIALS = 5
"""Most finished trials before the median pruner starts (Optuna's default); a quarter of sweep.trials if less."""

PROPOSALS = 10
"""Proposals that Optuna makes for an untried combination of a finite space."""


def draw(
    settings: SweepConfig,
    space: Mapping[str, Dimension],
    study: optuna.Study,
    tried: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the values of the next trial, without changing the study.

    In a finite space no combination comes twice: the first new one of PROPOSALS proposals, else the first untried one.
    """
    trial = optuna.trial.create_trial(state=TrialState.RUNNING)
    trial.number = len(tried)
    kinds = {name: distribution(dimension) for name, dimension in space.items()}
    finite = is_finite(tuple(space.values()))
    for attempt in range(PROPOSALS if finite else 1):
        sampler = make_sampler(settings, len(tried), attempt)
        if isinstance(sampler, optuna.samplers.CmaEsSampler):
            found = dict(replayed(study, sampler).ask(kinds).params)
        else:
            found = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        for name, kind in kinds.items():
            if name not in found:
                found[name] = sampler.sample_independent(study, trial, name, kind)
        values = {name: chosen(space[name], found[name]) for name in kinds}
        if values not in tried or not finite:
            return values
    return next(values for values in cells(tuple(space.values())) if values not in tried)


def replayed(study: optuna.Study, sampler: BaseSampler) -> optuna.Study:
    """Return the completed trials as a study in memory.

    CMA-ES pickles its state into a study and would unpickle it from the journal, where anybody may have put code.
    """
    again = optuna.create_study(sampler=sampler, direction=study.direction)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for trial in sorted(complete, key=lambda trial: (trial.datetime_complete, trial.number)):
        again.enqueue_trial(trial.params)
        taken = again.ask(trial.distributions)
        _ = taken.relative_params  # Reading it is what updates CMA-ES's state.
        again.tell(taken, trial.value)
    return again


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
    """Return a value as Optuna's journal can hold it: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(dimension, Values) and isinstance(value, (list, dict)) else value


def chosen(dimension: Dimension, choice: Any) -> Any:
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


LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(sweep: Path) -> Iterator[None]:
    """Hold SWEEP/.lock (flock), and mend the journal. Not reentrant.

    Optuna's own file lock survives a kill and may be broken by others after 30 s.
    """
    with (sweep / LOCK_NAME).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{sweep} is on a file system without locks ({error.strerror}), which the workers of a sweep need; set "
                "run_dir to a folder on another file system"
            ) from error
        mend(sweep / JOURNAL_NAME)
        yield


class _NoLock:
    """The lock that Optuna takes for a write, which `locked` makes unnecessary."""

    def acquire(self) -> bool:
        """Do nothing."""
        return True

    def release(self) -> None:
        """Do nothing."""


def open_journal(sweep: Path) -> JournalStorage:
    """Return the journal of a sweep, read to its end. Raises UserError for a damaged one."""
    journal = sweep / JOURNAL_NAME
    try:
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=_NoLock()))  # type: ignore[arg-type]
    # Optuna raises these for a line that is not JSON, lacks a field or names an unknown trial.
    except (ValueError, LookupError, TypeError, AssertionError, AttributeError, optuna.exceptions.OptunaError) as error:
        raise UserError(
            f"{journal} is damaged ({type(error).__name__}: {error}); restore a complete copy, or start the "
            "sweep again in another folder"
        ) from error


def mend(journal: Path) -> None:
    """Cut off an incomplete last line, which a kill or a full disk left and which Optuna cannot read past."""
    if not journal.is_file():
        return
    with journal.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
