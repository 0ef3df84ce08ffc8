"""Submit runs to SLURM: everything that needs no GPU is done first, then sbatch is called.

The submitting node makes the run folder, downloads the model and tokenizes the data, so that a job which waited for
GPUs does not fail because of a mistyped path.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from distlora.config import ClusterConfig, Config, QuantConfig, UserError, require
from distlora.config.file import load_config
from distlora.planner import Plan
from distlora.run_folder.layout import checkpoint_folders, find_result
from distlora.run_folder.submission import SLURM, Submission, read_submission, write_submission
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE, STOPPED
from distlora.system.stop_signals import forwarding
from distlora.training.trackers.wandb_agent import ASKED
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.hub import restore
from distlora_launcher.compose.planning import keep, planned
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.script import SCRIPT_NAME, check_shell, render, write_script
from distlora_launcher.launch.local import (
    is_prepared,
    make_run,
    prepare,
    print_resume_hint,
)
from distlora_launcher.launch.lock import lock_run
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
    for field in dataclasses.fields(config.cluster):
        values = dict.fromkeys(str(getattr(run.cluster, field.name)) for run in runs)
        require(
            len(values) == 1,
            f"cluster.{field.name} is {' and '.join(values)} in this sweep, and the tasks of an array are alike; start "
            "one sweep for each",
        )
    if sweeps:
        config = dataclasses.replace(config, run_dir=str(Path(config.run_dir).parent))
    script = render(config, gpus=scheduler.has_gpus(config.cluster.partition), tasks=runs if sweeps else ())
    check_shell(config.cluster.setup, script)
    return script


def check_with_slurm(script: str) -> None:
    """Raise UserError for a script that SLURM, if it is installed here, would refuse."""
    if scheduler.is_here():
        scheduler.try_submission(script)


def submit_run(plan: Plan) -> int:
    """Make the run, prepare its data, write RUN/job.sbatch and submit it. Returns the exit code."""
    code, config = make_run(plan)
    if code != DONE:
        print_resume_hint(Path(config.run_dir), code)
        return code
    submit_prepared(Path(config.run_dir))
    return DONE


def resubmit_run(run_dir: Path) -> int:
    """Submit a run again, to continue from its newest checkpoint. Refused while its job waits or runs."""
    require_no_job(run_dir)
    code = make_ready(run_dir)
    if code != DONE:
        print_resume_hint(run_dir, code)
        return code
    saved = checkpoint_folders(run_dir)
    say(f"{shown(run_dir)} continues from {saved[-1].name if saved else 'the start, as nothing was saved yet'}")
    submit_prepared(run_dir)
    return DONE


def require_no_job(run_dir: Path) -> None:
    """Raise UserError while a job of the run waits or runs."""
    if (job := live_job(run_dir)) is not None:
        raise UserError(
            f"{run_dir} is SLURM job {job.job_id}, which is {job.state.lower()}; wait for it (`distlora status "
            f"{shown(run_dir)}`), or end it with `distlora cancel {shown(run_dir)}`"
        )


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


def live_jobs(folder: Path) -> list[Job]:
    """Return the pending and running tasks of a sweep's last array. Raises SchedulerError if SLURM cannot be asked."""
    submission = read_submission(folder)
    if submission is None or not scheduler.is_here():
        return []
    jobs = scheduler.find_jobs(submission.job_id).values()
    return [job for job in jobs if job.is_live and job.is_of(folder / "trials")]


def make_ready(run_dir: Path) -> int:
    """Check a run that is to continue, and restore its model and data. Returns the exit code."""
    config = load_config(run_dir)
    restore(config.model)
    check(config, new_run=False)
    plan = planned(config, run_dir=run_dir)
    with lock_run(run_dir):
        keep(run_dir, plan, runs_here=False)
        return DONE if is_prepared(run_dir) else prepare(run_dir)


def submit_prepared(run_dir: Path) -> None:
    """Write the script of a prepared run and submit it. Raises UserError if there is no SLURM or it refuses.

    A script that was changed by hand is submitted as it is.
    """
    config = load_config(run_dir)
    write_script(run_dir, render(config, gpus=scheduler.has_gpus(config.cluster.partition)))
    (run_dir / "logs").mkdir(exist_ok=True)  # For the job's log: SLURM makes no folder.
    make_cache(config.cluster, config.quant)
    submission = submit_script(run_dir)
    log = run_dir / "logs" / f"{SLURM}{submission.job_id}.log"
    say(f"submitted {shown(run_dir)} as SLURM job {submission.job_id}")
    say(f"watch it with: distlora status {shown(run_dir)}   (what it prints: {shown(log)})")
    say(f"stop it with: distlora cancel {shown(run_dir)}")


def make_cache(cluster: ClusterConfig, quant: QuantConfig) -> None:
    """Make the folder for quantized weights if a container mounts it: it must exist before the start."""
    if cluster.container is not None and quant.keeps_shards:
        with contextlib.suppress(OSError):
            atomic_io.private_folder(Path(quant.cache_dir))


def submit_script(folder: Path, *options: str) -> Submission:
    """Submit the script in a folder and record the submission there. `options` of sbatch override the script's.

    Raises UserError if there is no SLURM here or it refuses the script.
    """
    path = folder / SCRIPT_NAME
    by_hand = shlex.join(["sbatch", *options, shown(path)])
    if not scheduler.is_here():
        raise UserError(
            "sbatch is not installed on this node, so nothing was submitted; the script is ready: on a node with "
            f"SLURM, submit it with `{by_hand}`"
        )
    command = ["sbatch", "--parsable", *options, str(path)]
    try:
        job_id = scheduler.submit(command, path.read_text(encoding="utf-8"))
    except SchedulerError as error:
        raise UserError(f"{scheduler.refusal(error)}; the script is written, try it with `{by_hand}`") from error
    submission = Submission(job_id=job_id, command=tuple(command), submitted=time.time(), host=socket.gethostname())
    write_submission(folder, submission)
    return submission


STEP = "DISTLORA_STEP"
"""Environment variable: bash code that starts RUN on all nodes."""

OWN_TRIALS = "OWN_TRIALS"
"""Environment variable: file to which this task appends the run folders it started."""

LOST_SECONDS = 0.2
"""Wait after starting bash: a signal sent before bash has become srun is lost."""


def in_job() -> bool:
    """Return whether this process runs in a worker of a sweep's array."""
    return STEP in os.environ


def start_in_job(plan: Plan) -> int:
    """Make a run and train it on the nodes of the job. Returns the exit code."""
    code, config = make_run(plan)
    run_dir = Path(config.run_dir)
    if code != DONE:
        print_resume_hint(run_dir, code)
        return code
    return run_step(run_dir)


def resume_in_job(run_dir: Path) -> int:
    """Continue a run on the nodes of the job. Returns the exit code."""
    code = make_ready(run_dir)
    return run_step(run_dir) if code == DONE else code


def run_step(run_dir: Path) -> int:
    """Train a prepared run on all nodes of the job. Returns the exit code; 75 if it was stopped and has saved."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    start = f"{os.environ.get('START', '0')}.{run_dir.name}.{int(time.time())}"
    stopped = logs / f"slurm_stopped_{start}"
    if OWN_TRIALS in os.environ:
        with open(os.environ[OWN_TRIALS], "a") as file:
            file.write(f"{run_dir}\n")
    environment = os.environ | {"RUN": str(run_dir), "START": start, "STOPPED": str(stopped)}
    with forwarding() as requests:
        process = subprocess.Popen(["bash", "-c", os.environ[STEP]], env=environment, start_new_session=True)
        time.sleep(LOST_SECONDS)
        # srun forwards USR1 to every node; TERM would end srun itself.
        requests.attach(process, lambda _: process.send_signal(signal.SIGUSR1))
        code = process.wait()
        requests.detach()
    has_stopped = stopped.exists()
    stopped.unlink(missing_ok=True)
    # 138: the signal came before there was a Python to take it, so nothing was trained.
    early = requests.received is not None and code in (128 + signal.SIGUSR1, -signal.SIGUSR1)
    if (code == DONE and has_stopped) or early:
        if requests.received is None and ASKED in os.environ:  # SLURM has asked the processes of the step alone.
            Path(os.environ[ASKED]).touch()
        return STOPPED
    if code == DONE:
        say(f"done: {shown(find_result(run_dir) or run_dir)}")
    return code if code >= 0 else 128 - code
