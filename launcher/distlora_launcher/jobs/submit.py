"""Submit runs to SLURM: everything that needs no GPU is done first, then sbatch is called.

The submitting node makes the run folder, downloads the model and tokenizes the data, so that a job which waited for
GPUs does not fail because of a mistyped path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from distlora.config import ClusterConfig, Config, QuantConfig, UserError, require
from distlora.run_folder.layout import checkpoint_folders
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.hub import restore
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.script import SCRIPT_NAME, check_shell, render, write_script
from distlora_launcher.launch.job_record import Submission, read_submission, write_submission
from distlora_launcher.launch.local import is_prepared, make_run, prepare, print_resume_hint
from distlora_launcher.launch.lock import lock_run
from distlora_launcher.launch.logs import SLURM
from distlora_launcher.terminal.output import say, shown


def is_job(cluster: ClusterConfig) -> bool:
    """Return whether a run is submitted to SLURM."""
    return cluster.launcher == "slurm"


def make_script(runs: Sequence[Config], *, sweeps: bool) -> str:
    """Return the script for `runs`; with `sweeps` they are the tasks of one array.

    Raises UserError for settings that no script can express.
    """
    config = runs[0]
    require(
        sweeps or config.cluster.max_parallel is None,
        f"cluster.max_parallel={config.cluster.max_parallel} is for the jobs of a sweep; add -m, or leave it out",
    )
    other = next((run for run in runs if run.cluster != config.cluster), None)
    if other is not None:
        name = next(
            field.name
            for field in dataclasses.fields(config.cluster)
            if getattr(other.cluster, field.name) != getattr(config.cluster, field.name)
        )
        values = f"{getattr(config.cluster, name)} and {getattr(other.cluster, name)}"
        raise UserError(
            f"cluster.{name} is {values} in this sweep, and the tasks of an array are alike; start one sweep for each"
        )
    tasks = [dataclasses.replace(run, run_dir=f"{config.run_dir}/{number}") for number, run in enumerate(runs)]
    script = render(config, gpus=scheduler.has_gpus(config.cluster.partition), tasks=tasks if sweeps else ())
    check_shell(config.cluster.setup, script)
    return script


def check_with_slurm(script: str) -> None:
    """Raise UserError for a script that SLURM, if it is installed here, would refuse."""
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
    """Submit a run again, to continue from its newest checkpoint. Refused while its job waits or runs."""
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
    """Return the job of a run if it waits or runs. Raises UserError if SLURM is here and does not answer."""
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
    """Check a run that is to continue, and restore its model and data. Returns the exit code."""
    restore(config.model)
    check(config, new_run=False)
    plan = planned(config, run_dir=run_dir)
    with lock_run(run_dir):
        keep(run_dir, plan, runs_here=False)
        return DONE if is_prepared(run_dir) else prepare(run_dir)


def submit_prepared(run_dir: Path, config: Config) -> None:
    """Write the script of a prepared run and submit it. Raises UserError if there is no SLURM or it refuses.

    A script that was changed by hand is submitted as it is.
    """
    if not write_script(run_dir, render(config, gpus=scheduler.has_gpus(config.cluster.partition))):
        print_script_kept(run_dir)
    (run_dir / "logs").mkdir(exist_ok=True)  # For the job's log: SLURM makes no folder.
    make_cache(config.cluster, config.quant)
    submission = submit_script(run_dir)
    write_submission(run_dir, submission)
    log = run_dir / "logs" / f"{SLURM}{submission.job_id}.log"
    say(f"submitted {shown(run_dir)} as SLURM job {submission.job_id}")
    say(f"watch it with: distlora status {shown(run_dir)}   (what it prints: {shown(log)})")
    say(f"stop it with: distlora cancel {shown(run_dir)}")


def make_cache(cluster: ClusterConfig, quant: QuantConfig) -> None:
    """Make the folder for quantized weights if a container mounts it: it must exist before the start."""
    if cluster.container is not None and quant.keeps_shards:
        with contextlib.suppress(OSError):
            Path(quant.cache_dir).mkdir(parents=True, exist_ok=True)


def print_script_kept(folder: Path) -> None:
    """Print that a folder's script was changed by hand and stays."""
    path = shown(folder / SCRIPT_NAME)
    say(f"{path} was changed by hand and is submitted as it is (remove it to have it written from config.yaml again)")


def submit_script(folder: Path, *options: str) -> Submission:
    """Submit the script in a folder, with options of sbatch that override the script's.

    Raises UserError if there is no SLURM here or it refuses the script.
    """
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
