"""Run a training run on the nodes of the current job: for a worker of a sweep's array. Nothing is submitted.

The array's script says how a trial is started on all nodes (slurm/sweep.sbatch.jinja).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from distlora.config import Config
from distlora.run_folder.layout import find_result
from distlora.system.exit_codes import DONE, STOPPED
from distlora.training.reporting.wandb_agent import ASKED
from distlora_launcher.jobs.submit import make_ready
from distlora_launcher.launch.local import make_run, print_resume_hint
from distlora_launcher.launch.signals import forwarding
from distlora_launcher.terminal.output import say, shown

STEP = "DISTLORA_STEP"
"""Environment variable: bash code that starts RUN on all nodes."""

OWN_TRIALS = "OWN_TRIALS"
"""Environment variable: file to which this task appends the run folders it started."""

LOST_SECONDS = 0.2
"""Wait after starting bash: a signal sent before bash has become srun is lost."""


def in_job() -> bool:
    """Return whether this process runs in a worker of a sweep's array."""
    return STEP in os.environ


def start_in_job(config: Config) -> int:
    """Make a run and train it on the nodes of the job. Returns the exit code."""
    code, config = make_run(config)
    run_dir = Path(config.run_dir)
    if code != DONE:
        print_resume_hint(run_dir, code)
        return code
    return run_step(run_dir)


def resume_in_job(run_dir: Path, config: Config) -> int:
    """Continue a run on the nodes of the job. Returns the exit code."""
    code = make_ready(run_dir, config)
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
        # srun hands USR1 on to every machine; of TERM it would end itself.
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
