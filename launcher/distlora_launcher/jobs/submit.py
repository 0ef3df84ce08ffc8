"""`distlora train cluster=slurm`, and `resume` of such a run: everything that needs no GPU here and now, then sbatch.

The run folder, the model's download and the tokenized data are made on the machine that submits, so a job that waited
for its GPUs does not end over a mistyped path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from distlora import durable
from distlora.config import Config, UserError, require
from distlora.config_file import load_config
from distlora.run_folder import checkpoint_folders, find_result
from distlora_launcher.checks import check
from distlora_launcher.hub import restore
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.record import Submission, read_submission, write_submission
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.script import SCRIPT_NAME, render
from distlora_launcher.local import is_prepared, make_run, prepare, running, say, shown
from distlora_launcher.logs import SLURM
from distlora_launcher.workers import DONE


def is_job(config: Config) -> bool:
    """Whether a run is submitted rather than started."""
    return config.cluster.launcher == "slurm"


def check_submission(runs: Sequence[Config], *, sweeps: bool) -> str:
    """The script for `runs`, as SLURM would be given it; with `sweeps` they are the tasks of one array.

    Raises UserError for what no script can do, and where SLURM is here, for what it refuses.
    """
    config = runs[0]
    require(
        sweeps or config.cluster.max_parallel is None,
        f"cluster.max_parallel={config.cluster.max_parallel} is for the jobs of a sweep; add -m, or leave it out",
    )
    odd = next((run for run in runs if run.cluster != config.cluster), None)
    if odd is not None:
        name = next(
            field.name
            for field in dataclasses.fields(config.cluster)
            if getattr(odd.cluster, field.name) != getattr(config.cluster, field.name)
        )
        values = f"{getattr(config.cluster, name)} and {getattr(odd.cluster, name)}"
        raise UserError(
            f"cluster.{name} is {values} in this sweep, and the tasks of an array are alike; start one sweep for each"
        )
    tasks = [dataclasses.replace(run, run_dir=f"{config.run_dir}/{number}") for number, run in enumerate(runs)]
    script = render(config, gpus=scheduler.has_gpus(config.cluster.partition), tasks=tasks if sweeps else ())
    if scheduler.is_here():
        scheduler.try_submission(script)
    return script


def submit_run(config: Config) -> int:
    """Make the run, prepare its data, write RUN/job.sbatch and submit it. Returns the exit code."""
    code, config = make_run(config)
    if code != DONE:
        return code
    submit_prepared(Path(config.run_dir), config)
    return DONE


def resume_run(run_dir: Path) -> int:
    """Submit a run again, which then continues from its newest checkpoint. Refused while its job waits or runs."""
    run_dir = run_dir.expanduser().absolute()
    config = load_config(run_dir)
    result = find_result(run_dir)
    if result is not None:
        say(f"{shown(run_dir)} is complete: {shown(result)}")
        return DONE
    job = live_job(run_dir)
    if job is not None:
        raise UserError(
            f"{run_dir} is SLURM job {job.job_id}, which is {job.state.lower()}; wait for it (`distlora status "
            f"{shown(run_dir)}`), or end it with `distlora cancel {shown(run_dir)}`"
        )
    code = make_ready(run_dir, config)
    if code != DONE:
        return code
    saved = checkpoint_folders(run_dir)
    say(f"{shown(run_dir)} goes on from {saved[-1].name if saved else 'its start, as nothing was saved yet'}")
    submit_prepared(run_dir, config)
    return DONE


def live_job(run_dir: Path) -> Job | None:
    """The job of a run, where it waits or runs: a second one would write into the same folder. Raises UserError where
    SLURM is here and does not say."""
    submission = read_submission(run_dir)
    if submission is None or not scheduler.is_here():
        return None
    try:
        job = scheduler.find_jobs(submission.job_id).get(submission.job_id)
    except SchedulerError as error:
        raise UserError(
            f"SLURM does not say whether job {submission.job_id} of {run_dir} still runs ({error}); try again later"
        ) from error
    return job if job is not None and job.is_live else None


def make_ready(run_dir: Path, config: Config) -> int:
    """Check a run that is to go on, and bring back what is gone of its model and data. Returns the exit code."""
    restore(config)
    check(config, new_run=False)
    with running(run_dir):
        return DONE if is_prepared(run_dir) else prepare(run_dir)


def submit_prepared(run_dir: Path, config: Config) -> None:
    """Write the script of a run that is ready, and submit it. Raises UserError where SLURM is not here or refuses.

    A script that somebody has changed since it was written is submitted as it is.
    """
    last, path = read_submission(run_dir), run_dir / SCRIPT_NAME
    if last is not None and path.is_file() and last.script not in (None, _digest(path.read_text(encoding="utf-8"))):
        say(f"{shown(path)} was changed by hand and is submitted as it is")
    else:
        write_script(run_dir, render(config, gpus=scheduler.has_gpus(config.cluster.partition)))
    submission = submit_script(run_dir)
    write_submission(run_dir, submission)
    log = run_dir / "logs" / f"{SLURM}{submission.job_id}.log"
    say(f"submitted {shown(run_dir)} as SLURM job {submission.job_id}")
    say(f"watch it with: distlora status {shown(run_dir)}   (what it prints: {shown(log)})")
    say(f"stop it with: distlora cancel {shown(run_dir)}")


def write_script(folder: Path, script: str) -> None:
    """Write the script of a run, and the folder for its log, which SLURM does not make."""
    durable.write_text(folder / SCRIPT_NAME, script)
    (folder / "logs").mkdir(exist_ok=True)


def submit_script(folder: Path) -> Submission:
    """Submit the script in a folder. Raises UserError where SLURM is not here, or refuses it."""
    path = folder / SCRIPT_NAME
    by_hand = f"sbatch {shlex.quote(shown(path))}"
    if not scheduler.is_here():
        raise UserError(
            f"there is no sbatch on this machine, so nothing is submitted; everything else is done: where SLURM is, "
            f"submit the script with `{by_hand}`"
        )
    command = ["sbatch", "--parsable", str(path)]
    try:
        job_id = scheduler.submit(command)
    except SchedulerError as error:
        raise UserError(f"{scheduler.refusal(error)}; the script is written, try it with `{by_hand}`") from error
    return Submission(
        job_id=job_id,
        command=tuple(command),
        submitted=time.time(),
        host=socket.gethostname(),
        script=_digest(path.read_text(encoding="utf-8")),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
