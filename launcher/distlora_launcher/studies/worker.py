"""Run a worker of a sweep: take trials from the table, train them and record the results, until none is due.

    python -m distlora_launcher.studies.worker SWEEP --index I [--agent=WORDS]

The command starts `sweep.workers` of them on this node, SLURM starts each as a task of an array; they share only SWEEP.
WORDS: the command line of `distlora sweep agent`, for a worker that runs a wandb agent.
Exit code 0: nothing is left to do; 75: stopped on request, its trials are saved.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.json_files import object_or_empty
from distlora.run_folder.layout import METRICS_NAME, SUMMARY_NAME
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED, SAVED, words_of, write_importance
from distlora.system.exit_codes import DONE, STOPPED, run_to_exit_code
from distlora.system.exit_codes import FAILED as FAILURE
from distlora.system.numbers import length
from distlora.system.stop_signals import Forwarder, block, forwarding
from distlora_launcher.launch.failures import would_repeat
from distlora_launcher.launch.lock import worker_place
from distlora_launcher.report.records import NewMetrics
from distlora_launcher.studies.alone import POLL_SECONDS, Alone
from distlora_launcher.studies.multi_trial import Together
from distlora_launcher.studies.placement import PlacedTrial, Placement, TrialOutcome
from distlora_launcher.studies.results import write_at_end, write_table
from distlora_launcher.studies.sources import NextAction, Source, check_optuna, make_source
from distlora_launcher.studies.sweep import Sweep, load_sweep
from distlora_launcher.studies.table import TrialTable, locked
from distlora_launcher.studies.wandb_sweep import work_as_agent
from distlora_launcher.terminal.arguments import Parser
from distlora_launcher.terminal.output import say, shown, warn

STRANGE_FAILURES = 3
"""Successive failures without a step, not explained by settings, after which the node is taken to be broken."""
LEAVE_SECONDS = 30.0
"""Time in seconds that processes may take to end after their last trial."""
ASK_SECONDS = 2.0
"""Time in seconds between two requests for a trial while none is due."""


class EvaluationFollower:
    """Reads the evaluations of a run as they are written to its metrics.jsonl."""

    def __init__(self, run_dir: Path, metric: str) -> None:
        self._metrics, self._metric = NewMetrics(run_dir), metric
        self.last: float | None = None
        """Last value of the metric; None before the first, and if it was not finite."""
        self.has_value = False

    def read(self) -> Iterator[tuple[int, float | None]]:
        """Yield (step, metric) of new complete lines; None for a value that is not finite.

        The evaluation at step 0 is of the base and left out.
        """
        for figures in self._metrics.look():
            if figures["step"] > 0 and self._metric in figures:
                value = figures[self._metric]
                number = isinstance(value, (int, float)) and math.isfinite(value)
                self.last, self.has_value = float(value) if number else None, True
                yield figures["step"], self.last


class Study:
    """The loop of a worker: ask the table for trials, place them, record how they end."""

    def __init__(self, sweep: Sweep, table: TrialTable, placement: Placement) -> None:
        self._sweep, self._table, self._placement = sweep, table, placement
        self._trials: dict[int, tuple[PlacedTrial, EvaluationFollower]] = {}
        self._ask_at = 0.0
        self._ended = self._saved = False
        self._strange = 0

    def work(self, forwarder: Forwarder) -> int:
        """Take and train trials until none is due. Returns the exit code."""
        stopping, leave_by = False, 0.0
        while True:
            if self._strange >= STRANGE_FAILURES and not stopping:
                warn(f"{STRANGE_FAILURES} trials in a row failed before their first step; this worker stops")
                stopping = True
                self._placement.stop()
            if forwarder.received is not None and not stopping:
                stopping = True
                self._placement.stop()
            if not stopping and not self._ended:
                self._take()
            for outcome in self._placement.poll():
                self._follow()
                self._end(outcome)
            self._follow()
            if not self._trials and (stopping or self._ended):
                leave_by = leave_by or time.monotonic() + LEAVE_SECONDS
                if self._placement.is_idle or time.monotonic() > leave_by:
                    if self._strange >= STRANGE_FAILURES:
                        return FAILURE
                    return DONE if self._ended and not self._saved else STOPPED
            time.sleep(POLL_SECONDS)

    def _take(self) -> None:
        """Fill the placement's free slots."""
        while len(self._trials) < self._placement.slots and time.monotonic() >= self._ask_at:
            due = self._table.ask()
            if due is NextAction.END:
                self._ended = True
                self._placement.close()
                return
            if isinstance(due, NextAction):
                self._ask_at = time.monotonic() + ASK_SECONDS
                return
            self._begin(due)

    def _begin(self, trial: PlacedTrial) -> None:
        overrides = " ".join(words_of(trial.values))
        say(f"trial {trial.number}: {'resumes' if trial.begun else 'starts'}, {overrides}")
        self._trials[trial.number] = trial, EvaluationFollower(trial.run_dir, self._sweep.settings.metric)
        try:
            self._placement.begin(trial)
        except UserError as error:
            reason = str(error)
            self._end(TrialOutcome(number=trial.number, state=FAILED, seconds=0.0, reason=reason, is_refused=True))

    def _follow(self) -> None:
        """Record new evaluations, and pass the pruner's decisions to the placement."""
        settings = self._sweep.settings
        for number, (_, follower) in self._trials.items():
            for step, value in follower.read():
                if value is not None:
                    self._table.report(number, step, value)
                if settings.pruner != "none":
                    prune = value is not None and self._should_prune(number)
                    self._placement.verdict(number, step, prune=prune)

    def _should_prune(self, number: int) -> bool:
        from distlora_launcher.studies.optuna_draws import judge

        return self._table.judge(number, functools.partial(judge, self._sweep.settings, self._sweep.space))

    def _end(self, outcome: TrialOutcome) -> None:
        trial, follower = self._trials.pop(outcome.number)
        self._saved |= outcome.state == SAVED
        outcome = self._judged(outcome, trial, follower)
        self._strange = self._strange + 1 if is_strange(outcome, trial.run_dir) else 0
        if self._strange >= STRANGE_FAILURES:  # Likely the node's fault: another worker tries it again.
            outcome = dataclasses.replace(outcome, state=SAVED)
        self._table.tell(outcome, follower.last, read_summary(trial.run_dir))
        say(self._sentence(outcome, follower))

    def _judged(self, outcome: TrialOutcome, trial: PlacedTrial, follower: EvaluationFollower) -> TrialOutcome:
        """Return the outcome; failed if the run is complete but has no finite value to compare."""
        if outcome.state != COMPLETE or follower.last is not None:
            return outcome
        metric = self._sweep.settings.metric
        reason = (
            f"its last {metric} is not finite"
            if follower.has_value
            else f"it logged no {metric} (sweep.metric) in {shown(trial.run_dir / METRICS_NAME)}"
        )
        return dataclasses.replace(outcome, state=FAILED, reason=reason)

    def _sentence(self, outcome: TrialOutcome, follower: EvaluationFollower) -> str:
        metric, step = self._sweep.settings.metric, "" if outcome.step is None else f" after step {outcome.step:,}"
        value = "" if follower.last is None else f", {metric} {follower.last:.4f}"
        why = "" if outcome.reason is None else f": {outcome.reason}"
        how = {COMPLETE: "done", PRUNED: "pruned", FAILED: "failed", SAVED: "saved"}[outcome.state]
        lasted = f" ({length(outcome.seconds)})" if outcome.state in (COMPLETE, PRUNED) else ""
        return f"trial {outcome.number}: {how}{step}{value}{lasted}{why}"


def is_strange(outcome: TrialOutcome, run_dir: Path) -> bool:
    """Return whether a trial failed before its first step, and not by bad input, divergence or lack of memory."""
    if outcome.state != FAILED or outcome.step or outcome.is_refused or would_repeat(run_dir / "logs"):
        return False
    return "out of memory" not in (outcome.reason or "").lower() and "OutOfMemory" not in (outcome.reason or "")


def read_summary(run_dir: Path) -> Mapping[str, Any]:
    """Return the figures of a run's summary that a trial record has."""
    summary = object_or_empty(run_dir / SUMMARY_NAME)
    return {
        name: summary[name]
        for name in ("trainable_parameters", "peak_memory_bytes")
        if isinstance(summary.get(name), int)
    }


def conclude(sweep: Sweep, table: TrialTable, source: Source) -> None:
    """Write the table, and at the end of the sweep the importance of settings and the report."""
    is_over = False
    try:
        with locked(sweep.folder):
            write_table(sweep, table.records(), source)
        is_over = table.is_over()
        if is_over and importlib.util.find_spec("optuna") is not None:
            from distlora_launcher.studies.optuna_draws import importance

            if shares := importance(sweep.settings, sweep.space, table.records()):
                write_importance(sweep.folder, shares, "PED-ANOVA, the best quarter")
    except OSError as error:  # The trials' results are kept all the same.
        warn(f"{shown(sweep.folder)}: cannot write the table and importance ({error})")
    if is_over:
        write_at_end(sweep.folder)


def run(folder: Path, index: int) -> int:
    """Run worker `index` of the sweep in a folder. Returns the exit code."""
    sweep = load_sweep(folder)
    source = make_source(sweep)
    check_optuna(sweep.settings, source)  # A sweep may be resumed on another machine.
    place = f"worker_{index}"
    with worker_place(folder, place), forwarding() as forwarder:
        table = TrialTable(sweep, source, place=place)
        is_alone = sweep.settings.packed == 1
        placement: Placement = Alone(sweep) if is_alone else Together(sweep, index, forwarder)
        code = Study(sweep, table, placement).work(forwarder)
        conclude(sweep, table, source)
    return code


def main() -> int:
    """Run the command line. Returns the exit code."""
    parser = Parser("distlora_launcher.studies.worker")
    parser.add_argument("sweep")
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--agent")
    options = parser.parse_args(sys.argv[1:])
    if options.agent is not None:
        return work_as_agent(shlex.split(options.agent), options.index)
    return run(Path(options.sweep).absolute(), options.index)


if __name__ == "__main__":
    block()
    sys.exit(run_to_exit_code(main))
