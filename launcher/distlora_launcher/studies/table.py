"""Keep the trials of a study in SWEEP/results.json: which worker has which, and their results.

A worker that takes a trial or records a result holds SWEEP/.lock (flock, released with its process), so no two workers
take the same trial. The file is replaced atomically: a kill leaves the state before or after a change.
"""

import contextlib
import dataclasses
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.run_folder.sweep import (
    COMPLETE,
    FAILED,
    RESULTS_NAME,
    RUNNING,
    SAVED,
    WAITING,
    TrialRecord,
    read_results,
    write_results,
)
from distlora_launcher.launch.lock import Process, holders, is_alive, this_process
from distlora_launcher.studies.placement import PlacedTrial, TrialOutcome
from distlora_launcher.studies.sources import NextAction, Source
from distlora_launcher.studies.sweep import Sweep
from distlora_launcher.terminal.output import warn

LOCK_NAME = ".lock"


class TrialTable:
    """The trials of a study, as one worker sees them."""

    def __init__(self, sweep: Sweep, source: Source, *, place: str | None = None) -> None:
        """`place`: name of this worker (`worker_place`)."""
        self._sweep, self._source, self._place = sweep, source, place

    def ask(self) -> PlacedTrial | NextAction:
        """Take a trial for this process: an abandoned one, a waiting one, or the next that the source names."""
        with self._changed() as trials:
            abandoned, is_busy = self._next_abandoned(trials)
            if abandoned is not None:
                return self._take(trials, abandoned, begun=True)
            if not any(trial.state == WAITING for trial in trials):
                due = self._source.next(trials)
                if due is NextAction.SAMPLE:
                    due = [self._source.draw(trials)]
                if isinstance(due, NextAction):
                    return NextAction.WAIT if is_busy else due
                _append(trials, due)
            waiting = next(trial for trial in trials if trial.state == WAITING)
            return self._take(trials, waiting, begun=False)

    def enqueue(self) -> None:
        """Record the trials that are known now, so that `status` shows them as waiting."""
        with self._changed() as trials:
            if not any(trial.state == WAITING for trial in trials):
                due = self._source.next(trials)
                _append(trials, () if isinstance(due, NextAction) else due)

    def report(self, number: int, step: int, value: float) -> None:
        """Record an evaluation of a trial."""
        with self._changed() as trials:
            trial = trials[number]
            if _is_own(trial) and step not in trial.evaluations:
                evaluations = {**trial.evaluations, step: value}
                trials[number] = replace(trial, step=step, value=value, evaluations=evaluations)

    def judge(self, number: int, judge: Callable[[list[TrialRecord], int], tuple[bool, Mapping[str, float]]]) -> bool:
        """Return whether the pruner ends a trial; keep what it knows of the trial for the next call, of any worker.

        judge: returns (ends it, TrialRecord.rungs).
        """
        with self._changed() as trials:
            prunes, rungs = judge(trials, number)
            if _is_own(trials[number]):
                trials[number] = replace(trials[number], rungs=rungs)
        return prunes

    def tell(self, outcome: TrialOutcome, value: float | None, figures: Mapping[str, Any]) -> None:
        """Record how a trial ended: its value, and the `figures` of TrialRecord that its run reports."""
        with self._changed() as trials:
            trial = trials[outcome.number]
            if not _is_own(trial):
                warn(f"trial {trial.number} was taken over by another worker; the result of this worker is dropped")
                return
            values: dict[str, Any] = {} if outcome.state == SAVED else {"state": outcome.state, "ended": time.time()}
            if outcome.state in (COMPLETE, FAILED):
                values["value"] = value if outcome.state == COMPLETE else None
            trials[trial.number] = replace(
                trial,
                owner=None,
                step=outcome.step,
                seconds=(trial.seconds or 0.0) + outcome.seconds,
                reason=trial.reason if outcome.reason is None else outcome.reason,
                **values,
                **figures,
            )

    def records(self) -> list[TrialRecord]:
        """Return all trials, by number. Raises UserError for a damaged record."""
        folder = self._sweep.folder
        return read_results(folder) if (folder / RESULTS_NAME).exists() else []

    def is_over(self) -> bool:
        """Return whether nothing runs, waits, or is due."""
        trials = self.records()
        return not any(trial.is_open for trial in trials) and self._source.next(trials) is NextAction.END

    @contextlib.contextmanager
    def _changed(self) -> Iterator[list[TrialRecord]]:
        """Hold the lock; yield the trials by number, and write them if they were changed."""
        with locked(self._sweep.folder):
            before = self.records()
            trials = list(before)
            yield trials
            if trials != before or not before:
                write_results(self._sweep.folder, trials)

    def _next_abandoned(self, trials: list[TrialRecord]) -> tuple[TrialRecord | None, bool]:
        """Return the first trial whose worker is dead, and whether a user resumes one by hand.

        The latter is left to the user until that run ends.
        """
        is_busy, folder = False, self._sweep.folder
        for trial in trials:
            if trial.state != RUNNING or (trial.owner and is_alive(folder, trial.place, Process(**trial.owner))):
                continue
            if not holders(self._sweep.run_dir(trial.number)):
                return trial, is_busy
            is_busy = True
        return None, is_busy

    def _take(self, trials: list[TrialRecord], trial: TrialRecord, *, begun: bool) -> PlacedTrial:
        owner = dataclasses.asdict(this_process())
        trials[trial.number] = replace(trial, state=RUNNING, owner=owner, place=self._place)
        return PlacedTrial(
            number=trial.number,
            values=trial.values,
            overrides=tuple(self._sweep.trial_overrides(trial.number, trial.values, self._source.overrides)),
            run_dir=self._sweep.run_dir(trial.number),
            begun=begun,
        )


def _append(trials: list[TrialRecord], due: Any) -> None:
    trials += [
        TrialRecord(number=number, state=WAITING, values=values) for number, values in enumerate(due, len(trials))
    ]


def _is_own(trial: TrialRecord) -> bool:
    """Return whether this process still has a trial: another may have taken it when locks were lost (NFS)."""
    return trial.state == RUNNING and trial.owner == dataclasses.asdict(this_process())


@contextlib.contextmanager
def locked(sweep: Path) -> Iterator[None]:
    """Hold SWEEP/.lock (flock). Not reentrant."""
    with (sweep / LOCK_NAME).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{sweep} is on a file system without locks ({error.strerror}), which the workers of a sweep need; set "
                "run_dir to a folder on another file system"
            ) from error
        yield
