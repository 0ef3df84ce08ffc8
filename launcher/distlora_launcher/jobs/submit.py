"""`distlora train cluster=slurm`, and `resume` of such a run: everything that needs no GPU here and now, then sbatch.

The run folder, the model's download and the tokenized data are made on the machine that submits, so a job that waited
for its GPUs does not end over a mistyped path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from distlora.config import Config, UserError, require
from distlora.run_folder.layout import checkpoint_folders
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.hub import restore
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.script import SCRIPT_NAME, check_shell, render, write_script
from distlora_launcher.launch.job_record import Submission, read_submission, write_submission
from distlora_launcher.launch.local import (
    is_prepared,
    make_run,
    prepare,
    print_resume_hint,
)
from distlora_launcher.launch.lock import lock_run
from distlora_launcher.launch.logs import SLURM
from distlora_launcher.terminal.output import say, shown


def is_job(config: Config) -> bool:
    """Whether a run is submitted rather than started."""
    return config.cluster.launcher == "slurm"


def script_of(runs: Sequence[Config], *, sweeps: bool) -> str:
    """The script for `runs`, as SLURM would be given it; with `sweeps` they are the tasks of one array.

    Raises UserError for what no script can do.
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
    check_shell(config, script)
    return script


def have_judged(script: str) -> None:
    """Raises UserError for what SLURM, where it is here, would refuse, before anything is made for it."""
    if scheduler.is_here():
        scheduler.try_submission(script)


def submit_run(config: Config) -> int:
    """Make the run, prepare its data, write RUN/job.sbatch and submit it. Returns the exit code."""
    code, config = make_run(config)
    if code != DONE:
        print_resume_hint(Path(config.run_dir), code)
        return code
    submit_prepared(Path(config.run_dir), config)
    return DONE


def resubmit_run(run_dir: Path, config: Config) -> int:
    """Submit a run again, which then continues from its newest checkpoint. Refused while its job waits or runs."""
    job = live_job(run_dir)
    if job is not None:
        raise UserError(
            f"{run_dir} is SLURM job {job.job_id}, which is {job.state.lower()}; wait for it (`distlora status "
            f"{shown(run_dir)}`), or end it with `distlora cancel {shown(run_dir)}`"
        )
    code = make_ready(run_dir, config)
    if code != DONE:
        print_resume_hint(run_dir, code)
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
        job = job if job is not None and job.is_of(run_dir) else None
    except SchedulerError as error:
        raise UserError(
            f"SLURM does not say whether job {submission.job_id} of {run_dir} still runs ({error}); try again later"
        ) from error
    return job if job is not None and job.is_live else None


def make_ready(run_dir: Path, config: Config) -> int:
    """Check a run that is to go on, and bring back what is gone of its model and data. Returns the exit code."""
    restore(config.model)
    check(config, new_run=False)
    plan = planned(config, run_dir=run_dir)
    with lock_run(run_dir):
        keep(run_dir, plan, runs_here=False)
        return DONE if is_prepared(run_dir) else prepare(run_dir)


def submit_prepared(run_dir: Path, config: Config) -> None:
    """Write the script of a run that is ready, and submit it. Raises UserError where SLURM is not here or refuses.

    A script that somebody has changed since it was written is submitted as it is.
    """
    if not write_script(run_dir, render(config, gpus=scheduler.has_gpus(config.cluster.partition))):
        say_kept(run_dir)
    (run_dir / "logs").mkdir(exist_ok=True)  # For the job's log: SLURM makes no folder.
    make_cache(config)
    submission = submit_script(run_dir)
    write_submission(run_dir, submission)
    log = run_dir / "logs" / f"{SLURM}{submission.job_id}.log"
    say(f"submitted {shown(run_dir)} as SLURM job {submission.job_id}")
    say(f"watch it with: distlora status {shown(run_dir)}   (what it prints: {shown(log)})")
    say(f"stop it with: distlora cancel {shown(run_dir)}")


def make_cache(config: Config) -> None:
    """The folder for quantized shards where a container mounts it: it does not start without."""
    if config.cluster.container is not None and config.quant.keeps_shards:
        with contextlib.suppress(OSError):
            Path(config.quant.cache_dir).mkdir(parents=True, exist_ok=True)


def say_kept(folder: Path) -> None:
    """That a folder's script is a person's now."""
    path = shown(folder / SCRIPT_NAME)
    say(f"{path} was changed by hand and is submitted as it is (remove it to have it written from config.yaml again)")


def submit_script(folder: Path, *options: str) -> Submission:
    """Submit the script in a folder, with options of sbatch that win over its own. Raises UserError where SLURM is not
    here, or refuses it."""
    path = folder / SCRIPT_NAME
    by_hand = shlex.join(["sbatch", *options, shown(path)])
    if not scheduler.is_here():
        raise UserError(
            f"there is no sbatch on this machine, so nothing is submitted; everything else is done: where SLURM is, "
            f"submit the script with `{by_hand}`"
        )
    command = ["sbatch", "--parsable", *options, str(path)]
    try:
        job_id = scheduler.submit(command, path.read_text(encoding="utf-8"))
    except SchedulerError as error:
        raise UserError(f"{scheduler.refusal(error)}; the script is written, try it with `{by_hand}`") from error
    return Submission(
        job_id=job_id,
        command=tuple(command),
        submitted=time.time(),
        host=socket.gethostname(),
    )
