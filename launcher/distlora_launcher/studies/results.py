"""Show a sweep: its status, the table of results (terminal and SWEEP/results.md), main effects of settings."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.results.record import Record, Table
from distlora.run_folder import sweep as sweep_folder
from distlora.run_folder.layout import REPORT_NAME
from distlora.run_folder.sweep import (
    COMPLETE,
    RESULTS_NAME,
    RUNNING,
    TrialRecord,
    at_rest,
    counted,
    ranked,
    read_importance,
    read_results,
)
from distlora.system import atomic_io
from distlora.system.numbers import length
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.submit import live_jobs
from distlora_launcher.launch.lock import Process, holders
from distlora_launcher.report.records import PageStatus, read_figures, recorded
from distlora_launcher.report.run_page import write_report
from distlora_launcher.report.sweep_page import SweepRecords, sweep_report, training_losses
from distlora_launcher.studies.sources import NextAction, Source, make_source
from distlora_launcher.studies.sweep import Sweep, load_sweep
from distlora_launcher.terminal.output import say, shown, warn

RESULTS_MD = "results.md"
CONCLUSION_NAME = "conclusion.json"
"""File in SWEEP with the source's conclusion for programs (Source.figures), if there is one."""
ENDED = {"done": "is done", "failed": "has ended, and no trial of it was trained to its end"}
"""Sentences about a sweep that has ended, by its state."""
LONGEST_REASON = 100
"""Most characters of a reason in the terminal; results.md has all of it."""


def best_of(sweep: Sweep, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the complete trial with the best value."""
    return sweep_folder.best_of(trials, sweep.settings.direction)


def results_table(sweep: Sweep, trials: Sequence[TrialRecord], *, longest: int | None = None) -> Table:
    """Return the trials, best first; reasons have at most `longest` characters."""
    settings = list(dict.fromkeys(name for trial in trials for name in trial.values))
    columns = {"trial": "", **dict.fromkeys(settings, ""), sweep.settings.metric: ".4f", "step": ","}
    rows, best = [], best_of(sweep, trials)
    for trial in ranked(trials, sweep.settings.direction):
        note = "best" if trial == best else " ".join((trial.reason or "").split())
        texts = [format_value(trial.values[name]) if name in trial.values else "" for name in settings]
        figures = ["" if value is None else value for value in (trial.value, trial.step)]
        note = note if longest is None or len(note) <= longest else note[: longest - 4] + " ..."
        time = "" if trial.seconds is None else length(trial.seconds)
        rows.append([str(trial.number), *texts, *figures, time, trial.state, note])
    return Table("", columns | {"time": "", "state": "", "note": ""}, rows)


def summary_lines(sweep: Sweep, trials: Sequence[TrialRecord]) -> list[str]:
    """Return the lines under the table: trials by state, the best one and how to use it."""
    lines = [f"{len(trials)} trials: {counted(trials)}"] if trials else ["no trial yet"]
    best = best_of(sweep, trials)
    if best is not None:
        run = shown(sweep.run_dir(best.number))
        lines.append(f"best: trial {best.number}, {run}; try it with: distlora generate {run}")
    return lines


def write_table(sweep: Sweep, trials: Sequence[TrialRecord], source: Source) -> None:
    """Write SWEEP/results.md, and SWEEP/conclusion.json if the source concludes something."""
    conclusion = source.conclusion(trials)
    if conclusion:
        atomic_io.write_json(sweep.folder / CONCLUSION_NAME, source.figures(trials))
    findings, table = summary_lines(sweep, trials), results_table(sweep, trials)
    record = Record(title=sweep.folder.name, findings=findings, tables=[table], notes="\n".join(conclusion))
    atomic_io.write_text(sweep.folder / RESULTS_MD, record.markdown())


def format_value(value: Any) -> str:
    """Return a setting's value in a short form."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(format_value, value))}]"
    return " ".join(str(value).split())


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepStatus:
    """The status of a sweep."""

    sweep: Sweep
    state: str
    """running (a worker is alive), queued (in SLURM), stopped (something is left to do), done (a trial is complete), or
    failed (all trials have ended, and none is complete)."""
    workers: list[Process]
    jobs: list[Job]
    """Live tasks of its SLURM array."""
    trials: list[TrialRecord]

    @property
    def next(self) -> str:
        """Return the command to type now."""
        folder = shown(self.sweep.folder)
        best = best_of(self.sweep, self.trials)
        if self.state in ("running", "queued"):
            return f"distlora cancel {folder}"
        if self.state == "stopped":
            return f"distlora resume {folder}"
        if best is None:
            return f"distlora report {folder}"
        return f"distlora generate {shown(self.sweep.run_dir(best.number))}"


def sweep_status(folder: Path) -> SweepStatus:
    """Return the status of the sweep in a folder, without Optuna. Raises UserError if it is damaged."""
    sweep = load_sweep(folder)
    workers = holders(folder)
    trials = read_results(folder) if workers or (folder / RESULTS_NAME).is_file() else []
    for index, trial in enumerate(trials):
        if trial.state == RUNNING:  # Its run folder has the newest step.
            trials[index] = dataclasses.replace(trial, step=read_figures(sweep.run_dir(trial.number)).step)
    is_over = not any(trial.is_open for trial in trials) and make_source(sweep).next(trials) is NextAction.END
    jobs = jobs_in_slurm(folder)
    state = state_of(workers, jobs, trials, is_over=is_over)
    if state == "stopped":
        trials = at_rest(trials)
    return SweepStatus(sweep=sweep, state=state, workers=workers, jobs=jobs, trials=trials)


def state_of(workers: Sequence[Process], jobs: Sequence[Job], trials: Sequence[TrialRecord], *, is_over: bool) -> str:
    """Return the state of a sweep (SweepStatus.state). `is_over`: its source has nothing more to try."""
    if workers or jobs:
        return "running" if workers else "queued"
    if not is_over or not trials or any(trial.is_open for trial in trials):
        return "stopped"
    return "done" if any(trial.state == COMPLETE for trial in trials) else "failed"


def jobs_in_slurm(folder: Path) -> list[Job]:
    """Return the sweep's live tasks in SLURM; none if SLURM does not answer."""
    try:
        return live_jobs(folder)
    except SchedulerError:  # Of what its workers do the folder tells as well.
        return []


def describe_status(status: SweepStatus) -> str:
    """Return the status as lines of text."""
    where = ", ".join(f"{process.host} (pid {process.pid})" for process in status.workers)
    how = {
        "running": f"is running on {where}",
        "queued": "waits in SLURM",
        "stopped": "is not done, and no worker runs",
        **ENDED,
    }[status.state]
    lines = [f"{shown(status.sweep.folder)} {how}"]
    for job in status.jobs:
        why = "" if job.reason is None else f" ({job.reason})"
        lines += [
            f"  SLURM job {job.job_id}: {job.state.lower()}{why}{'' if job.nodes is None else f' on {job.nodes}'}"
        ]
    if status.trials:
        lines += [results_table(status.sweep, status.trials, longest=LONGEST_REASON).text()]
    lines += summary_lines(status.sweep, status.trials)
    return "\n".join([*lines, f"next: {status.next}"])


def status_as_json(status: SweepStatus) -> str:
    """Return the status as JSON."""
    best = best_of(status.sweep, status.trials)
    values: dict[str, Any] = {
        "sweep": str(status.sweep.folder),
        "state": status.state,
        "metric": status.sweep.settings.metric,
        "workers": [{"host": process.host, "pid": process.pid} for process in status.workers],
        "jobs": [{"job_id": job.job_id, "state": job.state, "nodes": job.nodes} for job in status.jobs],
        "best": None if best is None else best.number,
        "trials": [
            dataclasses.asdict(trial) | {"run_dir": str(status.sweep.run_dir(trial.number))} for trial in status.trials
        ],
        "next": status.next,
    }
    return json.dumps(values, indent=2)


MOST_BYTES, MOST_BYTES_AT_END = 64_000_000, 4_000_000
"""Size limit, in bytes, of all trials' metrics.jsonl up to which losses are drawn: on request (5 s), at the end."""

MOST_TRIALS = 32
"""Most multi-trial runs that get a report when their sweep ends (0.04 s each); `distlora report RUN` makes others."""


def page_of_sweep(folder: Path, *, most: int = MOST_BYTES, has_ended: bool = False) -> str:
    """Return the report of a sweep, as far as its folder can be read. `has_ended`: its last worker calls."""
    records = SweepRecords(folder=folder, settings=None, trials=[])
    is_over = True  # If the source cannot be made, the trials decide.
    with recorded(records.problems):
        if (folder / RESULTS_NAME).exists():
            records.trials = read_results(folder)
    with recorded(records.problems):
        sweep = load_sweep(folder)
        records.settings, records.shared = sweep.settings, sweep.overrides
        source = make_source(sweep)
        records.conclusion = source.conclusion(records.trials)
        is_over = source.next(records.trials) is NextAction.END
    with recorded(records.problems):
        records.importance, records.importance_by = read_importance(folder)
    with recorded(records.problems):
        records.losses = training_losses(folder, records.trials, records.problems, most=most)
        linked = [trial.number for trial in records.trials if (trial.folder(folder) / REPORT_NAME).is_file()]
        records.links = frozenset(linked)
    stands = standing(folder, records.trials, is_over=is_over, has_ended=has_ended)
    if stands.state == "stopped":
        records.trials = at_rest(records.trials)
    return sweep_report(records, stands)


def standing(folder: Path, trials: Sequence[TrialRecord], *, is_over: bool, has_ended: bool = False) -> PageStatus:
    """Return how a sweep stands by its workers and trials."""
    name = shlex.quote(str(folder))
    workers = [] if has_ended else holders(folder)
    jobs = [] if has_ended else jobs_in_slurm(folder)
    commands = [(f"distlora report {name}", "write this report again")]
    state = state_of(workers, jobs, trials, is_over=is_over)
    if workers or jobs:
        headline = "waits in SLURM as " + ", ".join(job.job_id for job in jobs)
        if workers:
            headline = "is running on " + ", ".join(f"{worker.host} (pid {worker.pid})" for worker in workers)
        commands.insert(0, (f"distlora cancel {name}", "have it save and stop"))
        commands.insert(0, (f"distlora status {name}", "how it stands now"))
    elif state == "stopped":
        headline = "has stopped before its end"
        resume = "go on with it: trials that were begun from their newest checkpoints"
        commands.insert(0, (f"distlora resume {name}", resume))
    else:
        headline = ENDED[state]
    return PageStatus(state=state, headline=headline, commands=tuple(commands))


def write_at_end(folder: Path) -> None:
    """Write SWEEP/report.html when the last worker ends. Errors are printed, and do not fail the sweep."""
    try:
        for trial in read_results(folder)[:MOST_TRIALS]:
            run_dir = trial.folder(folder)
            # A run's launcher writes its report; multi-trial runs have none.
            if trial.state == COMPLETE and not (run_dir / REPORT_NAME).exists():
                write_report(run_dir)
        page = page_of_sweep(folder, most=MOST_BYTES_AT_END, has_ended=True)
        atomic_io.write_text(folder / REPORT_NAME, page)
        say(f"report: {shown(folder / REPORT_NAME)}")
    except Exception as error:
        again = f"distlora report {shown(folder)}"
        warn(
            f"cannot write the report ({type(error).__name__}: {error}); the results are kept; try again with: {again}"
        )
