"""Run the workers of a sweep, or wandb agents, as the tasks of a SLURM array (`cluster=slurm`).

Each task has `cluster.nodes` nodes and is one worker, which trains one trial after the other on them. Before its time
limit, or when it is preempted, its trial saves, and the task is requeued and resumes it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distlora.config import ClusterConfig, Config, DataConfig, ModelConfig, QuantConfig, UserError, require
from distlora.system.exit_codes import DONE
from distlora_launcher.compose.hub import localize
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.scheduler import Job, SchedulerError
from distlora_launcher.jobs.script import SCRIPT_NAME, check_shell, render_workers, write_script
from distlora_launcher.jobs.submit import check_with_slurm, make_cache, print_script_kept, submit_script
from distlora_launcher.launch.local import create_run, prepare
from distlora_launcher.launch.run_state import read_submission, write_submission
from distlora_launcher.sweeps.folder import LOGS, Sweep
from distlora_launcher.terminal.output import say, shown


def render_script(sweep: Sweep, config: Config) -> str:
    """Return the script of a sweep's workers; `config` is of one trial. Raises UserError if it cannot be made."""
    settings = sweep.settings
    require(
        settings.packed == 1 or config.cluster.nodes == 1,
        f"sweep.packed={settings.packed} with cluster.nodes={config.cluster.nodes}: trials are trained together on one "
        "node; set cluster.nodes=1, or sweep.packed=1",
    )
    return _script(
        sweep.folder,
        config,
        settings.workers,
        ["distlora_launcher.sweeps.worker", str(sweep.folder)],
        trials="trials/*",
    )


def submit(sweep: Sweep, config: Config) -> int:
    """Submit the workers of a sweep. Returns the exit code."""
    refuse_live(sweep.folder)
    code = ready(config)
    if code != DONE:
        say(f"nothing was submitted; start another sweep, or try again with: distlora resume {shown(sweep.folder)}")
        return code
    _submit(sweep.folder, config.cluster, config.quant, render_script(sweep, config), sweep.settings.workers)
    folder = shown(sweep.folder)
    say(f"watch with: distlora status {folder}")
    say(f"stop with: distlora cancel {folder}")
    return DONE


def submit_agents(request: Any, cluster: ClusterConfig) -> int:
    """Submit wandb agents (`wandb_agents.AgentsRequest`). Returns the exit code."""
    # The agents' runs get their settings from wandb; the script needs paths only to mount them in a container.
    config = Config(
        model=ModelConfig(path=str(request.folder)),
        data=DataConfig(path=str(request.folder)),
        cluster=cluster,
        run_dir=str(request.folder),
        name=request.sweep_id,
    )
    refuse_live(request.folder)
    script = _script(
        request.folder,
        config,
        request.workers,
        ["distlora_launcher.cli.main", "sweep", "agent", *request.one()],
        trials="*",
    )
    check_with_slurm(script)
    (request.folder / LOGS).mkdir(parents=True, exist_ok=True)
    request.keep()
    _submit(request.folder, cluster, QuantConfig(), script, request.workers)
    say(f"stop with: distlora cancel {shown(request.folder)}")
    return DONE


def ready(config: Config) -> int:
    """Download the model and prepare the data of a first trial, before the job waits in the queue.

    Compute nodes may have no network. Returns the exit code.
    """
    config = dataclasses.replace(config, model=localize(config.model))
    with tempfile.TemporaryDirectory(prefix="distlora-prepare-") as scratch:
        folder = Path(scratch) / "run"
        create_run(folder, dataclasses.replace(config, run_dir=str(folder)))
        return prepare(folder)


def live_jobs(folder: Path) -> list[Job]:
    """Return the pending and running tasks of a sweep's last array. Raises SchedulerError if SLURM cannot be asked."""
    submission = read_submission(folder)
    if submission is None or not scheduler.is_here():
        return []
    jobs = scheduler.find_jobs(submission.job_id).values()
    return [job for job in jobs if job.is_live and job.is_of(folder / "trials")]


def refuse_live(folder: Path) -> None:
    """Raise UserError if SLURM still has workers of a sweep, or does not answer."""
    try:
        jobs = live_jobs(folder)
    except SchedulerError as error:
        raise UserError(
            f"cannot tell whether SLURM still runs workers of {folder} ({error}); try again later"
        ) from error
    if jobs:
        raise UserError(
            f"{shown(folder)} has SLURM job {jobs[0].job_id}, which is {jobs[0].state.lower()}; wait for it, or end it "
            f"with `distlora cancel {shown(folder)}`"
        )


def _script(folder: Path, config: Config, workers: int, worker: Sequence[str], *, trials: str) -> str:
    config = dataclasses.replace(config, run_dir=str(folder))
    script = render_workers(
        config,
        gpus=scheduler.has_gpus(config.cluster.partition),
        workers=workers,
        worker=worker,
        trials=trials,
        time_limit_in=f"#SBATCH --time in {SCRIPT_NAME}",
        again="distlora resume $SWEEP",
    )
    check_shell(config.cluster.setup, script)
    return script


def _submit(folder: Path, cluster: ClusterConfig, quant: QuantConfig, script: str, workers: int) -> None:
    if not write_script(folder, script):
        print_script_kept(folder)
    (folder / LOGS).mkdir(exist_ok=True)  # For the tasks' logs: SLURM does not make it.
    make_cache(cluster, quant)
    submission = submit_script(folder)
    write_submission(folder, submission)
    count = "1 worker" if workers == 1 else f"{workers} workers"
    say(f"submitted {count} of {shown(folder)} as SLURM job array {submission.job_id}")
