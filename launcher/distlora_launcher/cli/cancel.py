"""`distlora cancel RUN`: request a run to save and stop, on this node or in SLURM; --now kills it."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distlora.config import UserError
from distlora.run_folder.sweep import CANCELLED_NAME, is_sweep_folder, sweep_of
from distlora_launcher.cli.status import Status, describe, statuses
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.submit import live_jobs
from distlora_launcher.launch.lock import CONFIG_NAME, Process, holders, host_name
from distlora_launcher.studies.wandb_sweep import is_agents_folder
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import say, shown

_HAS_ENDED = re.compile(r"(?i)already (completing|completed|finished)|invalid job id")
"""SLURM's messages for a job that has ended already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelRequest:
    """Save and stop a run: its processes on this node, or its SLURM job.

    The job is not requeued; a pending job leaves the queue. `distlora resume RUN` continues the run.

    example: distlora cancel runs/first
    """

    run: str
    """RUN: folder of a run, of several runs (all of them stop) or of a sweep (its running trials stop and no new one
    starts; SWEEP/trials/N stops one trial)."""
    now: bool = False
    """Kill the run at once, without a save."""


def main(arguments: list[str]) -> int:
    """End the run, or the runs, in a folder."""
    options = read(CancelRequest, "distlora cancel", arguments)
    folder = Path(options.run).expanduser().absolute()
    if is_sweep_folder(folder) or is_agents_folder(folder):
        cancel_sweep(folder, now=options.now)
    else:
        cancel(folder, now=options.now)
    return 0


def cancel(folder: Path, *, now: bool) -> None:
    """End the run, or the runs, in a folder. Raises UserError if none runs, or it cannot be ended from this node."""
    runs = statuses(folder)
    unknown = next((status.unknown for status in runs if status.unknown is not None), None)
    if unknown is not None:
        raise UserError(f"SLURM does not answer ({unknown}), so nothing was cancelled; try again later")
    in_jobs = [status for status in runs if status.job is not None and status.job.is_live]
    here = [status for status in runs if status.holders and status not in in_jobs]
    jobs = [status.job for status in in_jobs if status.job is not None]
    if not jobs and not here:
        alone = (folder / CONFIG_NAME).exists()
        raise UserError(describe(runs[0]).splitlines()[0] if alone else f"no run in {shown(folder)} runs or waits")
    for status in here:
        note_cancelled(status)
        cancel_processes(status.run_dir, status.holders, now=now)
    try:
        cancel_jobs(jobs, now=now)
    except SchedulerError as error:
        raise UserError(f"SLURM refuses: {error}") from error


def note_cancelled(status: Status) -> None:
    """Tell the worker of a sweep that only this trial ends."""
    sweep = sweep_of(status.run_dir)
    if sweep is None:
        return
    if any(process in holders(sweep) for process in status.holders):
        raise UserError(
            f"{shown(status.run_dir)} is trained in a pack with other trials, which would end with it; end all of them "
            f"with `distlora cancel {shown(sweep)}`"
        )
    (status.run_dir / CANCELLED_NAME).touch()


def cancel_jobs(jobs: Sequence[Job], *, now: bool) -> None:
    """End SLURM jobs. Raises SchedulerError with what SLURM refused, unless the job has ended by itself.

    scancel alone gives a job no more than KillWait (30 s) between TERM and KILL, and a save may take longer. So a
    running job gets USR1, as before its time limit, after its requeue is turned off.
    """
    running = [job.job_id for job in jobs if job.state == "RUNNING"]
    others = [job.job_id for job in jobs if job.state != "RUNNING"]
    if now:
        others, running = [*running, *others], []
    refused: list[str] = []

    def ask(*command: str) -> bool:
        try:
            scheduler.ask(command)
        except SchedulerError as error:
            if _HAS_ENDED.search(str(error)) is None:
                refused.append(str(error))
            return False
        return True

    if others and ask("scancel", *others):  # It goes through all of them.
        say(f"cancelled SLURM job {', '.join(others)}")
    running = [job_id for job_id in running if ask("scontrol", "update", f"JobId={job_id}", "Requeue=0")]
    # By way of the controller: else scancel sends the signal to a task of an array again and again while other tasks
    # wait, for minutes (24.11).
    if running and ask("scancel", "--ctld", "--batch", "--signal=USR1", *running):
        say(f"SLURM job {', '.join(running)} is saving and stopping; `distlora status` shows when it has stopped")
    if refused:
        raise SchedulerError("; ".join(refused))


def cancel_sweep(sweep: Path, *, now: bool) -> None:
    """End the workers of a sweep, whose trials save and stop. Raises UserError if none runs or none is on this node."""
    try:
        jobs = live_jobs(sweep)
        cancel_jobs(jobs, now=now)
    except SchedulerError as error:
        raise UserError(f"SLURM refuses: {error}") from error
    workers = holders(sweep)
    if jobs:
        return
    if not workers:
        raise UserError(f"no worker of {shown(sweep)} is running; `distlora status {shown(sweep)}` shows its state")
    cancel_processes(sweep, workers, now=now)


def cancel_processes(folder: Path, holding: Sequence[Process], *, now: bool) -> None:
    """End a run or a sweep by its launchers on this node. Raises UserError if none is on this node."""
    run = shown(folder)
    here = [process for process in holding if process.is_of_this_machine]
    if not here:
        process = holding[0]
        here_is = host_name() if process.host != host_name() else "another container, or it has started anew"
        raise UserError(
            f"{run} runs on {process.host}, and this is {here_is}; run the command there, or `ssh {process.host} "
            f"kill -{'KILL' if now else 'TERM'} {process.pid}`"
        )
    for process in here:
        try:
            process.send(signal.SIGKILL if now else signal.SIGTERM)
        except ProcessLookupError:
            continue  # It has ended meanwhile.
        except PermissionError as error:
            raise UserError(f"{run} belongs to another user: process {process.pid} cannot be ended by you") from error
    if now:
        pids = ", ".join(str(process.pid) for process in here)
        say(f"killed {run} (pid {pids}); distlora resume {run} continues from its last save")
    else:
        say(f"{run} is saving and stopping; distlora status {run} shows when it has stopped")
