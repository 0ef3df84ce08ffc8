"""`distlora status RUN`: print the state of a run, wherever it runs; of a folder of runs, one line each."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.file import load_config
from distlora.config.json_files import object_or_empty
from distlora.results.record import Table
from distlora.run_folder.layout import DATA_NAME, find_result
from distlora.run_folder.submission import SLURM, read_submission
from distlora.run_folder.sweep import is_sweep_folder
from distlora.system import progress
from distlora.system.numbers import length
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.script import SCRIPT_NAME
from distlora_launcher.launch.failures import Ending, is_service, read_ending
from distlora_launcher.launch.lock import CONFIG_NAME, Process, holders
from distlora_launcher.report.records import (
    Figures,
    NewestSave,
    age,
    newest_saved,
    read_figures,
    seconds_left,
    total_steps,
    was_started,
)
from distlora_launcher.terminal.arguments import read
from distlora_launcher.terminal.output import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusRequest:
    """Print the state of a run, of each run in a folder, of a sweep, or of a service.

    The state is: running, and where (this node, other nodes, a SLURM job), or ended, and how; step, losses, time left,
    last save, and the command to type next.

    example: distlora status runs/first
    """

    run: str
    """RUN: folder of a run, of several runs (`distlora train -m`), of a sweep, or of `distlora serve`."""
    json: bool = False
    """Print a JSON object; for a folder of runs, a list of objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The state of a run."""

    run_dir: Path
    state: str
    """One of queued, running, ending, done, stopped (on a request, with a save), failed, ended (killed), new (not
    started)."""
    launcher: str | None
    """local, torchrun or slurm; None if the settings are damaged."""
    job: Job | None
    """The run's SLURM job; None if it has none or SLURM has forgotten it."""
    job_id: str | None
    """Id of its last submission."""
    holders: list[Process]
    """Launchers that hold the run now."""
    figures: Figures
    total_steps: int | None
    seconds_left: float | None
    saved: NewestSave | None
    ending: Ending
    result: Path | None
    """Folder of the published result."""
    damaged: str | None = None
    """Reason why the settings cannot be read; then all that depends on them is None."""
    unknown: str | None = None
    """Reason why SLURM did not answer; then the rest comes from the run folder."""

    @property
    def next(self) -> str | None:
        """Command to type next; None if there is none."""
        run = shown(self.run_dir)
        if self.state in ("queued", "running"):
            return f"distlora cancel {run}"
        if self.state == "done":
            return f"distlora generate {run}"
        if self.state == "new" and self.job_id is None and (self.run_dir / SCRIPT_NAME).exists():
            return f"sbatch {run}/{SCRIPT_NAME}"
        if self.damaged is not None:
            return f"distlora verify {run}"
        return None if self.state == "ending" or self.ending.bad_input else f"distlora resume {run}"


def main(arguments: list[str]) -> int:
    """Print the state of the run, or the runs, in a folder."""
    options = read(StatusRequest, "distlora status", arguments)
    folder = Path(options.run).expanduser().absolute()
    if is_sweep_folder(folder):
        from distlora_launcher.studies.results import describe_status, status_as_json, sweep_status

        sweep = sweep_status(folder)
        print(status_as_json(sweep) if options.json else describe_status(sweep))
        return 0
    if is_service(folder):
        from distlora_launcher.cli.serve import describe as describe_service

        print(describe_service(folder, as_json=options.json))
        return 0
    runs = statuses(folder)
    if (folder / CONFIG_NAME).exists():
        print(json.dumps(as_object(runs[0]), indent=2) if options.json else describe(runs[0]))
        if runs[0].damaged is not None:
            raise UserError(runs[0].damaged)
    else:
        print(json.dumps([as_object(status) for status in runs], indent=2) if options.json else table(folder, runs))
    return 0


def run_folders(folder: Path) -> list[Path]:
    """Return the run in a folder, or the runs directly in it by number. Raises UserError if there is none."""
    if (folder / CONFIG_NAME).exists():
        return [folder]
    runs = [path.parent for path in folder.glob(f"*/{CONFIG_NAME}")] if folder.is_dir() else []
    if not runs:
        reason = "holds no run (no config.yaml) and no folders of runs" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {reason}; name the folder of a run, as `distlora train` prints it")
    return sorted(runs, key=lambda run: (not run.name.isdigit(), int(run.name) if run.name.isdigit() else 0, run.name))


def statuses(folder: Path) -> list[Status]:
    """Return the state of the run in a folder, or of the runs in it. SLURM is queried once per job or array.

    Raises UserError for a folder that holds neither.
    """
    runs = run_folders(folder)
    submissions = {run: read_submission(run) for run in runs}
    arrays = {submission.array for submission in submissions.values() if submission is not None}
    # A task is found by its array, which a single run need not ask for as a whole.
    ids = {submission.job_id for submission in submissions.values() if submission is not None}
    jobs: dict[str, Job] = {}
    unknown = None
    for queried_id in sorted(arrays if len(runs) > 1 else ids):
        try:
            jobs |= scheduler.find_jobs(queried_id)
        except SchedulerError as error:
            unknown = str(error)
    listed = []
    for run in runs:
        submission = submissions[run]
        job_id = None if submission is None else submission.job_id
        job = jobs.get(job_id or "")
        if job is not None and not job.is_of(run):
            job = None
        listed.append(status_of(run, job_id, job, unknown if job_id is not None else None))
    return listed


def status_of(run_dir: Path, job_id: str | None, job: Job | None, unknown: str | None) -> Status:
    """Return the state of one run, given its SLURM job."""
    config, damaged = None, None
    try:
        config = load_config(run_dir)
    except (UserError, OSError) as error:
        damaged = str(error)
    processes, ending, result = holders(run_dir), read_ending(run_dir), find_result(run_dir)
    figures, data = read_figures(run_dir), object_or_empty(run_dir / DATA_NAME)
    total = None if config is None else total_steps(config.total_steps, data)
    state = _state(run_dir, job, processes, ending, result)
    return Status(
        run_dir=run_dir,
        state=state,
        launcher=None if config is None else config.cluster.launcher,
        job=job,
        job_id=job_id,
        holders=processes,
        figures=figures,
        total_steps=total,
        seconds_left=seconds_left(figures, total, config.train.global_batch * config.data.sequence_length)
        if config is not None and state == "running"
        else None,
        saved=newest_saved(run_dir),
        ending=ending if state in ("stopped", "failed", "queued") else Ending(),
        result=result,
        damaged=damaged,
        unknown=unknown,
    )


def _state(run_dir: Path, job: Job | None, processes: list[Process], ending: Ending, result: Path | None) -> str:
    if result is not None and not processes:
        return "done"
    if job is not None and job.is_live:
        queued = job.state in ("PENDING", "CONFIGURING") or job.state.startswith("REQUEUE")
        return "queued" if queued else "ending" if job.state == "COMPLETING" else "running"
    if processes:
        return "running"
    if ending.stopped is not None:
        return "stopped"
    if ending.error is not None:
        return "failed"
    return "ended" if was_started(run_dir) or (job is not None and not job.is_live) else "new"


def describe(status: Status) -> str:
    """Return the state of a run as lines for a person."""
    run, figures = shown(status.run_dir), status.figures
    lines = [f"{run} {headline(status)}"]
    if status.unknown is not None:
        lines.append(f"SLURM does not answer ({status.unknown}), so this state comes from the folder")
    if figures.step > 0 or status.total_steps is not None:
        total = f" of {status.total_steps:,} ({figures.step / status.total_steps:.0%})" if status.total_steps else ""
        left = f", {length(status.seconds_left)} left" if status.seconds_left is not None else ""
        written = f", logged {age(figures.time)} ago" if figures.time is not None and status.state != "done" else ""
        lines.append(f"step      {figures.step:,}{total}{left}{written}")
    if shown_figures(figures):
        lines.append(f"figures   {shown_figures(figures)}")
    if status.state != "done":
        saved = status.saved
        what = f"step {saved.step:,}, {age(saved.time)} ago" if saved is not None else "nothing yet"
        lines.append(f"saved     {what}")
    log = _log(status)
    if log is not None:
        lines.append(f"log       {shown(log)}")
    if status.next is not None:
        lines.append(f"next      {status.next}")
    return "\n".join(lines)


def table(folder: Path, runs: list[Status]) -> str:
    """Return a table with one line per run of a folder."""
    columns = {"run": "", "state": "", "step": "", "loss": ".4f", "held-out": ".4f", "where": ""}
    rows = []
    for status in runs:
        figures, total = status.figures, f"/{status.total_steps}" if status.total_steps is not None else ""
        cells = [status.run_dir.name, status.state, f"{figures.step}{total}", figures.loss, figures.eval_loss]
        rows.append([*("" if cell is None else cell for cell in cells), _where(status)])
    lines = [Table("", columns, rows).text()]
    unknown = next((status.unknown for status in runs if status.unknown is not None), None)
    lines += [f"{status.run_dir.name}: {status.damaged}" for status in runs if status.damaged is not None]
    if unknown is not None:
        lines.append(f"SLURM does not answer ({unknown}), so these states come from the folders")
    return "\n".join([*lines, f"more of one: distlora status {shown(runs[0].run_dir)}"])


def as_object(status: Status) -> dict[str, Any]:
    """Return the state as a JSON object: times in seconds since 1970, durations in seconds, null if unknown."""
    figures, saved, ending = status.figures, status.saved, status.ending
    return {
        "run_dir": str(status.run_dir),
        "state": status.state,
        "launcher": status.launcher,
        "job_id": status.job_id,
        "job": None if status.job is None else asdict(status.job),
        "machines": [{"host": process.host, "pid": process.pid} for process in status.holders],
        "total_steps": status.total_steps,
        **asdict(figures),
        "seconds_left": status.seconds_left,
        "saved": None if saved is None else {"step": saved.step, "path": str(saved.path), "time": saved.time},
        "stopped": None if ending.stopped is None else dict(ending.stopped),
        "error": ending.error,
        "damaged": status.damaged,
        "result": None if status.result is None else str(status.result),
        "next": status.next,
    }


def shown_figures(figures: Figures) -> str:
    """Return the metrics as the run's log does: `loss 2.103 reward 0.412 eval_loss 2.201 12,345 tok/s mem 1.23 GB`."""
    newest = {name: value for name, value in asdict(figures).items() if value is not None}
    return progress.figures(newest | newest.pop("objective"))


def headline(status: Status) -> str:
    """Return the state of a run as the end of a sentence that begins with its name."""
    job, stopped = status.job, status.ending.stopped
    if status.state == "queued":
        since = f", {_stop(stopped)}" if stopped is not None else ""
        return f"is queued as {_where(status)}{since}"
    if status.state == "running":
        return f"is running {'as' if job is not None else 'on'} {_where(status)}"
    if status.state == "ending":
        return f"is about to end as {_where(status)}"
    if status.state == "done":
        return f"is done: {shown(status.result)}" if status.result is not None else "is done"
    if status.state == "stopped" and stopped is not None:
        return _stop(stopped)
    if status.state == "failed":
        return f"has failed: {status.ending.error}"
    if status.state == "new":
        return "is prepared and was never started"
    if job is None:
        return "has ended without a message: its processes were killed, or their node failed"
    why = f", {job.reason}" if job.reason is not None else ""
    code = f" with code {job.exit_code}" if job.exit_code else ""
    return f"has ended as SLURM job {job.job_id}, {job.state}{code}{why}"


def _stop(stopped: Any) -> str:
    """Return stopped.json as a sentence."""
    moment = stopped.get("time")
    since = f", {age(moment)} ago" if isinstance(moment, (int, float)) else ""
    by = f" (on {stopped['signal']}{since})" if isinstance(stopped.get("signal"), str) else since
    if stopped.get("checkpoint") is None:
        return f"has stopped before anything was trained{by}"
    return f"has stopped after step {stopped.get('step')}, which is saved{by}"


def _where(status: Status) -> str:
    """Return where a run is, or waits."""
    job = status.job
    if job is None or not job.is_live:
        return ", ".join(f"{process.host} (pid {process.pid})" for process in status.holders)
    place = f" on {job.nodes}" if job.nodes is not None else ""
    times = "once" if job.restarts == 1 else f"{job.restarts} times"
    again = f", started again {times}" if job.restarts else ""
    why = f" ({job.reason})" if job.reason is not None else ""
    return f"SLURM job {job.job_id}{place}{again}{why}"


def _log(status: Status) -> Path | None:
    """Return the log to read next: rank 0's, or the job's if there is none yet."""
    logs = status.run_dir / "logs"
    candidates = [logs / "rank_0.log"]
    if status.job_id is not None:
        candidates.append(logs / f"{SLURM}{status.job_id}.log")
    if status.state == "failed" or (status.state == "ended" and status.job is not None):
        candidates.reverse()
    return next((path for path in candidates if path.exists()), None)
