"""The trials of a sweep, in Optuna's journal: the only module that knows Optuna, beside the plots.

SWEEP/journal.log is the truth, and appended to by all workers. Whoever asks for a trial, or says what came of one,
holds SWEEP/.lock meanwhile (flock, which ends with its holder), so a decision is made on what is written and no two
workers make the same. Each draw has a seed of its own, from sweep.seed and the trial's number: a sweep that goes on
draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from distlora.config import UserError
from distlora.config.sweep import SweepConfig
from distlora.sweep_folder import (
    COMPLETE,
    FAILED,
    JOURNAL_NAME,
    PRUNED,
    RUNNING,
    WAITING,
    TrialRecord,
    write_results,
)
from distlora_launcher.holding import holders
from distlora_launcher.processes import Process, this_process
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.runner import SAVED, Asked, Outcome
from distlora_launcher.sweeps.search import Due, Search
from distlora_launcher.sweeps.space import Dimension, Interval, Values, cells, is_finite

NAME = "sweep"
LOCK_NAME = ".lock"

MOST_STARTUP_TRIALS = 5
"""Finished trials before the median prunes; Optuna's default. Of short sweeps a quarter of the trials."""

PROPOSALS = 10
"""Questions to Optuna for a combination that was not tried."""

LEAST_JUDGED = 8
"""Finished trials before it is said which settings made the difference."""

_STATES = {
    TrialState.WAITING: WAITING,
    TrialState.RUNNING: RUNNING,
    TrialState.COMPLETE: COMPLETE,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
}


class Study:
    """The trials of a sweep, as one worker sees them."""

    def __init__(self, sweep: Sweep, search: Search) -> None:
        self._sweep, self._search = sweep, search
        self._lock = _Lock(sweep.folder / LOCK_NAME)
        self._space = {dimension.setting: dimension for dimension in sweep.space}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = sweep.folder / JOURNAL_NAME
        with self._lock.held():
            _mend(path)
            storage = _open(path, self._lock)
            if not storage.get_all_studies():
                optuna.create_study(storage=storage, study_name=NAME, direction=sweep.settings.direction)
            self._study = optuna.load_study(storage=storage, study_name=NAME, pruner=_pruner(sweep.settings))

    def ask(self) -> Asked | Due:
        """A trial for this process: one that a worker left behind, one that waits, or the next of the search."""
        with self._lock.held():
            left = self._left_behind()
            if left is not None:
                self._set(left, owner=dataclasses.asdict(this_process()))
                return self._asked(left, begun=True)
            waiting = self._trials(TrialState.WAITING)
            if not waiting:
                due = self._search.next(self.records())
                if due is Due.SAMPLE and not is_finite(self._sweep.space):
                    return self._sample()
                if due is Due.SAMPLE:
                    due = [self._untried()]
                if isinstance(due, Due):
                    return due
                for values in due:
                    self._enqueue(values)
                waiting = self._trials(TrialState.WAITING)
            names = waiting[0].system_attrs["fixed_params"]
            trial = self._study.ask({name: _distribution(self._space[name]) for name in names})
            frozen = self._trial(trial.number)
            self._set(frozen, owner=dataclasses.asdict(this_process()))
            self._write()
            return self._asked(frozen, begun=False)

    def enqueue(self) -> None:
        """Note the trials that are known now, so that they are seen to wait."""
        with self._lock.held():
            records = self.records()
            due = Due.WAIT if any(record.state == WAITING for record in records) else self._search.next(records)
            for values in due if not isinstance(due, Due) else ():
                self._enqueue(values)
            self._write()

    def report(self, number: int, step: int, value: float) -> None:
        """An evaluation of a trial."""
        with self._lock.held():
            frozen = self._trial(number)
            if step not in frozen.intermediate_values:
                optuna.trial.Trial(self._study, frozen._trial_id).report(value, step)
                self._write()

    def should_prune(self, number: int) -> bool:
        """Whether the pruner ends a trial after its last evaluation."""
        frozen = self._trial(number)
        if len(frozen.intermediate_values) <= self._sweep.settings.pruner_warmup:
            return False
        return bool(self._study.pruner.prune(self._study, frozen))  # NumPy has its own.

    def tell(self, outcome: Outcome, value: float | None, figures: Mapping[str, Any]) -> None:
        """How a trial ended: its value, and what of TrialRecord its run says (`figures`)."""
        with self._lock.held():
            frozen = self._trial(outcome.number)
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
        """All trials, by number."""
        return [_record(trial) for trial in self._study.get_trials(deepcopy=False)]

    def is_over(self) -> bool:
        """Whether nothing runs, waits, or is due."""
        with self._lock.held():
            records = self.records()
            return not any(record.is_open for record in records) and self._search.next(records) is Due.END

    def importances(self) -> dict[str, float] | None:
        """The share of each setting in what makes a trial one of the best quarter (PED-ANOVA, arXiv 2304.10255); None
        for too few trials, or none that differ."""
        complete = self._trials(TrialState.COMPLETE)
        names = {name for trial in complete for name, kind in trial.distributions.items() if not kind.single()}
        if len(complete) < LEAST_JUDGED or not names:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            shares = optuna.importance.get_param_importances(self._study, evaluator=evaluator, params=sorted(names))
        return shares if sum(shares.values()) > 0 else None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The sweep to oneself, for files that all workers write."""
        with self._lock.held():
            yield

    def _write(self) -> None:
        write_results(self._sweep.folder, self.records())

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _trial(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _set(self, trial: FrozenTrial, **values: Any) -> None:
        for name, value in values.items():
            self._study._storage.set_trial_user_attr(trial._trial_id, name, value)

    def _left_behind(self) -> FrozenTrial | None:
        """The first trial that is said to run, and whose worker does not live."""
        running = self._trials(TrialState.RUNNING)
        alive = holders(self._sweep.folder) if running else []
        for trial in running:
            owner = trial.user_attrs.get("owner")
            if owner is None or Process(**owner) not in alive:
                return trial
        return None

    def _asked(self, trial: FrozenTrial, *, begun: bool) -> Asked:
        values = _values(self._trial(trial.number))
        return Asked(
            number=trial.number,
            values=values,
            words=tuple(self._sweep.trial_words(trial.number, values, self._search.words)),
            run_dir=self._sweep.run_dir(trial.number),
            begun=begun,
        )

    def _enqueue(self, values: Mapping[str, Any]) -> None:
        params = {name: _choice(self._space[name], value) for name, value in values.items() if name in self._space}
        self._study.enqueue_trial(params, user_attrs={"values": dict(values)})

    def _untried(self) -> dict[str, Any]:
        """What Optuna proposes of a finite space, but nothing twice: the first of some proposals that is new, else the
        first combination that is."""
        tried = [_values(trial) for trial in self._study.get_trials(deepcopy=False)]
        trial = optuna.trial.create_trial(state=TrialState.RUNNING)
        trial.number = len(tried)
        for attempt in range(PROPOSALS):
            sampler = _sampler(self._sweep.settings, len(tried), attempt)
            kinds = {name: _distribution(dimension) for name, dimension in self._space.items()}
            together = sampler.infer_relative_search_space(self._study, trial)
            found = sampler.sample_relative(self._study, trial, together)
            values = {}
            for name, kind in kinds.items():
                if name not in found:
                    found[name] = sampler.sample_independent(self._study, trial, name, kind)
                values[name] = _chosen(self._space[name], found[name])
            if values not in tried:
                return values
        return next(values for values in cells(self._sweep.space) if values not in tried)

    def _sample(self) -> Asked:
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(self._sweep.settings, number)
        trial = self._study.ask({name: _distribution(dimension) for name, dimension in self._space.items()})
        values = {name: _chosen(self._space[name], choice) for name, choice in trial.params.items()}
        frozen = self._trial(trial.number)
        self._set(frozen, values=values, owner=dataclasses.asdict(this_process()))
        self._write()
        return self._asked(frozen, begun=False)


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


def _distribution(dimension: Dimension) -> BaseDistribution:
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
    return CategoricalDistribution([_choice(dimension, value) for value in values])


def _choice(dimension: Dimension, value: Any) -> Any:
    """A value as Optuna's journal can hold it: lists and mappings as text."""
    return json.dumps(value) if isinstance(dimension, Values) and isinstance(value, (list, dict)) else value


def _chosen(dimension: Dimension, choice: Any) -> Any:
    """The value that `_choice` made a choice of."""
    if isinstance(dimension, Values):
        return next(value for value in dimension.values if _choice(dimension, value) == choice)
    return choice


def _sampler(settings: SweepConfig, number: int, attempt: int = 0) -> BaseSampler:
    """What draws trial `number`, with a seed of its own."""
    seed = random.Random(f"{settings.seed}/{number}/{attempt}").randrange(2**32)
    if settings.method == "random":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of what Optuna calls experimental.
        try:
            if settings.sampler == "gp":
                return optuna.samplers.GPSampler(seed=seed)
            if settings.sampler == "cmaes":
                return optuna.samplers.CmaEsSampler(seed=seed)
        except ImportError as error:
            package = "scipy" if settings.sampler == "gp" else "cmaes"
            raise UserError(
                f"sweep.sampler={settings.sampler} needs {package}, which is not installed; `pip install {package}`, "
                "or set sweep.sampler=tpe"
            ) from error
        # The liar counts trials that still run as bad ones, so that workers do not all propose the same.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=settings.workers > 1 or settings.packed != 1)


def _pruner(settings: SweepConfig) -> optuna.pruners.BasePruner:
    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    quarter = MOST_STARTUP_TRIALS if settings.trials is None else max(1, settings.trials // 4)
    return optuna.pruners.MedianPruner(n_startup_trials=min(MOST_STARTUP_TRIALS, quarter))


def check_sampler(settings: SweepConfig) -> None:
    """Refuse a sampler whose packages are missing."""
    _sampler(settings, 0)


def _open(journal: Path, lock: _Lock) -> JournalStorage:
    """The journal, read to its end. Raises UserError for a damaged one."""
    try:
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))  # type: ignore[arg-type]
    # Optuna replays the lines as they are: of one that is no JSON, lacks a field or names another trial.
    except (ValueError, LookupError, TypeError, AssertionError, AttributeError, optuna.exceptions.OptunaError) as error:
        raise UserError(
            f"{journal} is damaged ({type(error).__name__}: {error}); put a whole copy in its place, or start the "
            "sweep again in another folder"
        ) from error


def _mend(journal: Path) -> None:
    """Take off a last line that a kill or a full disk has cut: Optuna cannot read past it."""
    if not journal.is_file():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


class _Lock:
    """SWEEP/.lock, which a process may take again while it has it; in Optuna's form of a lock, too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._depth = 0
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        if self._depth == 0:
            file = self._path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                file.close()
                raise UserError(
                    f"{self._path.parent} is on a file system without locks ({error.strerror}), which the workers of a "
                    "sweep share its trials by; set run_dir to a folder on another"
                ) from error
            self._file = file
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()
