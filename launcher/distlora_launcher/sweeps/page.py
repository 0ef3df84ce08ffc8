"""Collect what a sweep's folder holds for its report (`distlora_launcher.report`)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from distlora.run_folder.layout import REPORT_NAME
from distlora.run_folder.sweep import COMPLETE, RESULTS_NAME, TrialRecord, at_rest, read_importance, read_results
from distlora.system import atomic_io
from distlora_launcher.launch.final_report import write_report
from distlora_launcher.launch.lock import holders
from distlora_launcher.report.records import PageStatus, recorded
from distlora_launcher.report.sweep_page import SweepRecords, sweep_report, training_losses
from distlora_launcher.sweeps.folder import load_sweep
from distlora_launcher.sweeps.results import jobs_in_slurm
from distlora_launcher.sweeps.search import Due, make_search
from distlora_launcher.terminal.output import say, shown, warn

MOST_BYTES, MOST_BYTES_AT_END = 64_000_000, 4_000_000
"""Size limit, in bytes, of all trials' metrics.jsonl up to which losses are drawn: on request (5 s), at the end."""

MOST_TRIALS = 32
"""Most multi-trial runs that get a report when their sweep ends (0.04 s each); `distlora report RUN` makes others."""


def page_of_sweep(folder: Path, *, most: int = MOST_BYTES, has_ended: bool = False) -> str:
    """Return the report of a sweep, as far as its folder can be read. `has_ended`: its last worker calls."""
    found = SweepRecords(folder=folder, settings=None, trials=[])
    is_over = True  # If the search cannot be read, the trials decide.
    with recorded(found.problems):
        if (folder / RESULTS_NAME).exists():
            found.trials = read_results(folder)
    with recorded(found.problems):
        sweep = load_sweep(folder)
        found.settings, found.shared = sweep.settings, sweep.overrides
        search = make_search(sweep)
        found.conclusion = search.conclusion(found.trials)
        is_over = search.next(found.trials) is Due.END
    with recorded(found.problems):
        found.importance, found.importance_by = read_importance(folder)
    with recorded(found.problems):
        found.losses = training_losses(folder, found.trials, found.problems, most=most)
        linked = [trial.number for trial in found.trials if (trial.folder(folder) / REPORT_NAME).is_file()]
        found.links = frozenset(linked)
    stands = standing(folder, found.trials, is_over=is_over, has_ended=has_ended)
    if stands.state == "stopped":
        found.trials = at_rest(found.trials)
    return sweep_report(found, stands)


def standing(folder: Path, trials: Sequence[TrialRecord], *, is_over: bool, has_ended: bool = False) -> PageStatus:
    """Return how a sweep stands by its workers and trials."""
    name = shlex.quote(str(folder))
    workers = [] if has_ended else holders(folder)
    jobs = [] if has_ended else jobs_in_slurm(folder)
    again = (f"distlora report {name}", "write this report again")
    if workers or jobs:
        state = "running" if workers else "queued"
        headline = "waits in SLURM as " + ", ".join(job.job_id for job in jobs)
        if workers:
            headline = "is running on " + ", ".join(f"{worker.host} (pid {worker.pid})" for worker in workers)
        commands = (
            (f"distlora status {name}", "how it stands now"),
            (f"distlora cancel {name}", "have it save and stop"),
        )
        return PageStatus(state=state, headline=headline, commands=(*commands, again))
    if is_over and trials and not any(trial.is_open for trial in trials):
        if any(trial.state == COMPLETE for trial in trials):
            return PageStatus(state="done", headline="is done", commands=(again,))
        return PageStatus(
            state="failed", headline="has ended, and no trial of it was trained to its end", commands=(again,)
        )
    resume = (f"distlora resume {name}", "go on with it: trials that were begun from their newest checkpoints")
    return PageStatus(state="stopped", headline="has stopped before its end", commands=(resume, again))


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
