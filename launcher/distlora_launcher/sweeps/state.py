"""How a sweep stands, for `distlora status`: from its records and who holds it; Optuna is not asked."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.run_folder.sweep import (
    RESULTS_NAME,
    RUNNING,
    TrialRecord,
    at_rest,
    read_results,
)
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.launch.lock import holders
from distlora_launcher.launch.processes import Process
from distlora_launcher.launch.run_state import read_figures
from distlora_launcher.sweeps.arrays import jobs_of
from distlora_launcher.sweeps.folder import Sweep, load_sweep
from distlora_launcher.sweeps.search import Due, search_of
from distlora_launcher.sweeps.table import best_of, closing, text
from distlora_launcher.terminal.output import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepStatus:
    """Everything that is known of a sweep."""

    sweep: Sweep
    state: str
    """running (a worker lives), queued (in SLURM), done, or stopped (something is left to do)."""
    workers: list[Process]
    jobs: list[Job]
    """Tasks of its array that SLURM has in its hands."""
    trials: list[TrialRecord]

    @property
    def next(self) -> str:
        """What to type now."""
        folder = shown(self.sweep.folder)
        best = best_of(self.sweep, self.trials)
        if self.state in ("running", "queued"):
            return f"distlora cancel {folder}"
        if self.state == "stopped" or best is None:
            return f"distlora resume {folder}" if self.state == "stopped" else f"distlora report {folder}"
        return f"distlora generate {shown(self.sweep.run_dir(best.number))}"


def sweep_status(folder: Path) -> SweepStatus:
    """How the sweep in a folder stands. Raises UserError for one that is damaged."""
    sweep = load_sweep(folder)
    workers = holders(folder)
    trials = read_results(folder) if workers or (folder / RESULTS_NAME).is_file() else []
    trials = [_as_now(sweep, trial) if trial.state == RUNNING else trial for trial in trials]
    is_over = not any(trial.is_open for trial in trials) and search_of(sweep).next(trials) is Due.END
    jobs = jobs_now(folder)
    state = "running" if workers else "queued" if jobs else "done" if is_over else "stopped"
    if state == "stopped":
        trials = at_rest(trials)
    return SweepStatus(sweep=sweep, state=state, workers=workers, jobs=jobs, trials=trials)


def jobs_now(folder: Path) -> list[Job]:
    """What SLURM has of a sweep; nothing where it does not answer."""
    try:
        return jobs_of(folder)
    except SchedulerError:  # Of what its workers do the folder tells as well.
        return []


def _as_now(sweep: Sweep, trial: TrialRecord) -> TrialRecord:
    """A trial that runs, at the step that its run folder has come to."""
    return dataclasses.replace(trial, step=read_figures(sweep.run_dir(trial.number)).step)


def describe(status: SweepStatus) -> str:
    """The lines for a person."""
    where = ", ".join(f"{process.host} (pid {process.pid})" for process in status.workers)
    how = {
        "running": f"is running on {where}",
        "queued": "waits in SLURM",
        "done": "is done",
        "stopped": "is not done, and nothing runs",
    }[status.state]
    lines = [f"{shown(status.sweep.folder)} {how}"]
    for job in status.jobs:
        why = "" if job.reason is None else f" ({job.reason})"
        lines += [
            f"  SLURM job {job.job_id}: {job.state.lower()}{why}{'' if job.nodes is None else f' on {job.nodes}'}"
        ]
    if status.trials:
        lines += [text(status.sweep, status.trials)]
    lines += closing(status.sweep, status.trials)
    return "\n".join([*lines, f"next: {status.next}"])


def as_json(status: SweepStatus) -> str:
    """For programs."""
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
