"""Test workers of a sweep as tasks of an array, on a real SLURM with two nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import slurm_cluster
from support.slurm_cluster import SlurmCluster, running_cluster
from support.slurm_commands import ENDED, distlora, job_of, steps_done
from support.small_models import read_metrics

MISSING = slurm_cluster.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no SLURM: {MISSING}")

STEPS = 100
"""Enough that a fast machine has not finished before it is stopped."""
START_SECONDS = 240.0
"""Time in seconds for imports on a machine with busy cores."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Run a cluster of nodes n1 and n2 with a GPU each."""
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster", gpus=1) as running:
        yield running


def settings(cluster: SlurmCluster, folders: Path) -> list[str]:
    return [
        *("cluster.gpus_per_node=1", "recipe=qlora", "data.sequence_length=64", "data.eval_fraction=0.1"),
        *(f"model.path={folders / 'llama'}", f"data.path={folders / 'text.jsonl'}"),
        *(f"data.cache_dir={cluster.folder.parent / 'cache'}", "plan.measure=false"),
        *(f"train.max_steps={STEPS}", "train.global_batch=2", "train.dtype=fp32"),
    ]


def wait_for(what: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not what():
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.3)


def said(folder: Path) -> str:
    """Return the output of tasks and trials."""
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted((folder / "logs").glob("*.log")))


def results(folder: Path) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["trials"]
    return trials


@pytest.mark.ci
def test_two_workers_of_an_array_train_a_sweep_and_the_preempted_one_goes_on(
    cluster: SlurmCluster, folders: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    words = ("cluster=slurm", "sweep.workers=2", "optim.lr=1e-3,2e-3", "tracker=none", f"run_dir={sweep}")
    submitted = distlora(cluster, "sweep", *settings(cluster, folders), *words)
    assert "submitted 2 workers" in submitted
    array = job_of(sweep)
    assert f"distlora cancel {sweep}" in distlora(cluster, "resume", str(sweep), expect=2)
    wait_for(lambda: all((sweep / "logs" / f"slurm_trials_{n}").exists() for n in (0, 1)), sweep)
    status = json.loads(distlora(cluster, "status", str(sweep), "--json"))
    assert (status["state"], sorted(worker["host"] for worker in status["workers"])) == ("running", ["n1", "n2"])
    assert sorted(job["state"] for job in status["jobs"]) == ["RUNNING", "RUNNING"]
    own = Path((sweep / "logs" / "slurm_trials_0").read_text().strip())
    wait_for(lambda: steps_done(own) >= 2, sweep)
    cluster.tell_to_stop(f"{array}_0")
    jobs = [cluster.wait(f"{array}_{n}", "COMPLETED", "FAILED", seconds=START_SECONDS) for n in (1, 0)]
    assert [(job["JobState"], job["Restarts"]) for job in jobs] == [("COMPLETED", "0"), ("COMPLETED", "1")], said(sweep)
    trials = results(sweep)
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    for trial in trials:
        run = sweep / "trials" / f"{trial['number']:04d}"
        assert [line["step"] for line in read_metrics(run) if "loss" in line] == list(range(1, STEPS + 1))
        assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == trial["values"]["optim.lr"]
    assert sum("resumes" in line for line in said(sweep).splitlines()) == 1
    assert json.loads(distlora(cluster, "status", str(sweep), "--json"))["state"] == "done"


@pytest.mark.slow
def test_a_trial_is_trained_on_all_machines_of_a_task_and_cancel_ends_the_sweep(
    cluster: SlurmCluster, folders: Path, tmp_path: Path
) -> None:
    """Check a cancel in the second trial, which resume continues."""
    sweep = tmp_path / "sweep"
    steps = 300
    words = (
        f"train.max_steps={steps}",
        "cluster=slurm",
        "cluster.nodes=2",
        "optim.lr=1e-3,2e-3",
        "tracker=none",
        f"run_dir={sweep}",
    )
    distlora(cluster, "sweep", *settings(cluster, folders), *words)
    wait_for(lambda: steps_done(sweep / "trials" / "0001") >= 2, sweep)
    distlora(cluster, "cancel", str(sweep))
    job = cluster.wait(f"{job_of(sweep)}_0", *ENDED, seconds=60)
    assert (job["ExitCode"], job["Restarts"]) == ("75:0", "0"), said(sweep)
    assert [trial["state"] for trial in results(sweep)] == ["complete", "running"]
    stopped = json.loads((sweep / "trials" / "0001" / "stopped.json").read_text())["step"]
    assert 2 <= stopped < steps
    distlora(cluster, "resume", str(sweep))
    assert cluster.wait(f"{job_of(sweep)}_0", *ENDED, seconds=START_SECONDS)["JobState"] == "COMPLETED", said(sweep)
    assert [trial["state"] for trial in results(sweep)] == ["complete", "complete"]
    for run in sorted((sweep / "trials").iterdir()):
        assert [line["step"] for line in read_metrics(run) if "loss" in line] == list(range(1, steps + 1))
        assert {path.name for path in (run / "logs").glob("rank_*.log")} == {"rank_0.log", "rank_1.log"}
