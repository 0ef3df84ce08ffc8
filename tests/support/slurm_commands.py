"""The command in a job of the real SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.slurm_cluster import SlurmCluster
from support.small_models import read_metrics

DISTLORA = Path(sys.executable).with_name("distlora")
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def distlora(cluster: SlurmCluster, *words: str, expect: int = 0, **variables: str) -> str:
    """Return the output of a command, which must exit with `expect`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= cluster.environment | {"OMP_NUM_THREADS": "1"} | variables
    finished = subprocess.run(
        [DISTLORA, *words], capture_output=True, text=True, env=environment, cwd=cluster.folder.parent, timeout=200
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == expect, output
    return output


def job_of(folder: Path) -> str:
    """Return the newest submission of a run or a sweep."""
    return json.loads((folder / "slurm.json").read_text())["job_id"]


def steps_done(run: Path) -> int:
    """Return the steps that a run has reported."""
    return sum("loss" in line for line in read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
