"""Runs on a real SLURM of two nodes, which this file starts on loopback and ends (tests/support/slurm_cluster.py).

One array serves the tests that are not slow: two runs, one at a time. The first is preempted and goes on, the second
takes its place meanwhile and is cancelled as it starts. The uninterrupted run is one of two ranks without SLURM.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.config.file import as_mapping, load_config
from support import slurm_cluster
from support.closeness import assert_same_run
from support.measured import free_port
from support.modules import ROOT
from support.runs import run_once
from support.slurm_cluster import SlurmCluster, running_cluster
from support.slurm_commands import DISTLORA, ENDED, distlora, job_of, steps_done
from support.worlds import World

MISSING = slurm_cluster.missing()
pytestmark = [pytest.mark.ci, pytest.mark.skipif(MISSING is not None, reason=f"no SLURM: {MISSING}")]

STEPS = 20
START_SECONDS = 180.0
"""For imports on a machine whose cores are busy with other tests."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Nodes n1 and n2 with two GPUs each."""
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


def train(cluster: SlurmCluster, folders: Path, *settings: str, expect: int = 0) -> str:
    """`distlora train` of a small model on two nodes, with a rank on each, submitted to the cluster."""
    return distlora(
        cluster,
        "train",
        *("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=1"),
        *(f"model.path={folders / 'llama'}", f"data.path={folders / 'text.jsonl'}", "recipe=qlora"),
        *(f"data.cache_dir={cluster.folder.parent / 'cache'}", "data.sequence_length=64", "data.eval_fraction=0"),
        *(f"train.max_steps={STEPS}", "train.global_batch=4", "train.dtype=fp32", "tracker=none", "plan.measure=false"),
        *settings,
        expect=expect,
    )


def statuses(cluster: SlurmCluster, folder: Path) -> list[dict[str, Any]]:
    """Return what `distlora status` prints of the runs of a sweep."""
    return json.loads(distlora(cluster, "status", str(folder), "--json"))


def wait_for(cluster: SlurmCluster, job_id: str, run: Path, condition: Callable[[], bool]) -> None:
    """Wait for something that a run does while its job is not over."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        state = cluster.job(job_id)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"job {job_id} is {state}\n{log(run)}"
        assert time.monotonic() < deadline, f"job {job_id}: not within {START_SECONDS:.0f} s\n{log(run)}"
        time.sleep(0.3)


def log(run: Path) -> str:
    """Return what the jobs of a run have printed."""
    return "\n".join(path.read_text() for path in sorted((run / "logs").glob("slurm_*.log")))


@dataclass
class Sweep:
    """An array of two runs, what became of it, and what was said of it meanwhile."""

    folder: Path
    array: str
    jobs: dict[str, dict[str, str]] = field(default_factory=dict)
    """SLURM's record of a task, by what had just happened."""
    said: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """`distlora status` of both, by what had just happened."""

    def run(self, number: int) -> Path:
        return self.folder / str(number)

    def task(self, number: int) -> str:
        return f"{self.array}_{number}"


@pytest.fixture(scope="module")
def sweep(cluster: SlurmCluster, folders: Path) -> Sweep:
    folder = cluster.folder.parent / "sweep"
    train(cluster, folders, "-m", "train.keep=3,4", "cluster.max_parallel=1", f"run_dir={folder}")
    sweep = Sweep(folder, job_of(folder))
    cluster.wait(sweep.task(0), "RUNNING", seconds=30)
    sweep.said["started"] = statuses(cluster, folder)

    wait_for(cluster, sweep.task(0), sweep.run(0), lambda: steps_done(sweep.run(0)) >= 2)
    cluster.tell_to_stop(sweep.task(0))
    sweep.jobs["preempted"] = cluster.wait(sweep.task(0), "PENDING", seconds=60)
    sweep.said["preempted"] = statuses(cluster, folder)

    cluster.wait(sweep.task(1), "RUNNING", seconds=60)  # It took the place of the first.
    wait_for(cluster, sweep.task(1), sweep.run(1), (sweep.run(1) / "logs" / "rank_0.log").exists)
    distlora(cluster, "cancel", str(sweep.run(1)))
    sweep.jobs["cancelled"] = cluster.wait(sweep.task(1), *ENDED, seconds=60)
    sweep.jobs["ended"] = cluster.wait(sweep.task(0), *ENDED, seconds=START_SECONDS)
    sweep.said["ended"] = statuses(cluster, folder)
    return sweep


@pytest.fixture(scope="module")
def whole(world: World, sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the same settings on two ranks of this node without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    config = replace(load_config(sweep.run(0)), run_dir=str(folder))
    (folder / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
    shutil.copy(sweep.run(0) / "data.json", folder)
    world.run(2, run_once, run_dir=folder)
    return folder


def test_a_preempted_run_saves_is_queued_again_and_ends_with_the_uninterrupted_adapter(
    sweep: Sweep, whole: Path
) -> None:
    assert sweep.jobs["preempted"]["Restarts"] == "1"
    ended = sweep.jobs["ended"]
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert "continuing from step_" in (sweep.run(0) / "logs" / "rank_0.log").read_text()
    assert_same_run(sweep.run(0), whole)


def test_status_tells_how_each_run_of_an_array_stands(sweep: Sweep) -> None:
    states = {moment: [status["state"] for status in said] for moment, said in sweep.said.items()}
    assert states["started"] == ["running", "queued"]  # cluster.max_parallel=1
    assert sweep.said["started"][1]["job"]["reason"] == "JobArrayTaskLimit"
    preempted = sweep.said["preempted"][0]
    assert preempted["state"] == "queued"
    assert preempted["saved"]["step"] == preempted["stopped"]["step"] >= 2
    assert states["ended"] == ["done", "stopped"]
    assert sweep.said["ended"][0]["job"]["restarts"] == 1


def test_a_cancelled_run_is_not_queued_again(sweep: Sweep) -> None:
    cancelled = sweep.jobs["cancelled"]
    assert (cancelled["JobState"], cancelled["ExitCode"], cancelled["Restarts"]) == ("FAILED", "75:0", "0")
    assert not (sweep.run(1) / "adapter").exists()


def test_resume_submits_a_task_of_an_array_as_a_job_and_cancel_takes_it_out_of_the_queue(
    cluster: SlurmCluster, sweep: Sweep
) -> None:
    run = sweep.run(1)
    cluster.call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        distlora(cluster, "resume", str(run))
        assert job_of(run).isdigit()
        assert json.loads(distlora(cluster, "status", str(run), "--json"))["state"] == "queued"
        distlora(cluster, "cancel", str(run))
        assert cluster.wait(job_of(run), *ENDED, seconds=30)["JobState"] == "CANCELLED"
    finally:
        cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_the_script_of_a_service_serves_until_it_is_told_to_stop(cluster: SlurmCluster, folders: Path) -> None:
    """The one of docs/service.md, with this model, folder and two GPUs."""
    tinker = pytest.importorskip("tinker", reason="the official client is not installed")
    place, port = cluster.folder.parent, free_port()
    text = (ROOT / "docs/service.md").read_text().partition("### In SLURM")[2]
    script = text.partition("```bash\n")[2].partition("```")[0]
    for typed, here in (
        ("exec distlora", f"exec {DISTLORA}"),
        ("/shared/Llama-3.1-70B", f"{folders / 'llama'} serve.port={port} train.dtype=fp32 data.sequence_length=64"),
        ("/shared/service", str(place / "service")),
        ("gpus_per_node=8", "gpus_per_node=2"),
        ("gpus-per-node=8", "gpus-per-node=2"),
    ):
        assert typed in script
        script = script.replace(typed, here)
    (place / "service.sbatch").write_text(script)
    log = place / "service.log"
    options = ("--parsable", f"--chdir={place}", f"--output={log}", str(place / "service.sbatch"))
    job = cluster.call("sbatch", *options).strip()
    wait_for(cluster, job, place / "service", lambda: log.exists() and "serving " in log.read_text())
    key = re.search(r"API key of default .*: (\S+)", log.read_text())
    assert key is not None
    client = tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key=key[1])
    assert client.create_lora_training_client(str(folders / "llama"), rank=2).result().get_info().lora_rank == 2
    cluster.call("scancel", "--batch", "--signal=TERM", job)
    ended = cluster.wait(job, *ENDED, seconds=60)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "others"), [("n2", "n[1,3]"), ("n1", "n[2-3]")], ids=["a node", "the node where they meet"]
)
def test_a_run_whose_node_is_lost_goes_on_elsewhere(
    folders: Path, tmp_path: Path, whole: Path, lost: str, others: str
) -> None:
    """SLURM gives a node up 26 to 39 s after it is gone (slurmd_timeout=10) and starts the job again 6 s later."""
    run = tmp_path / "run"
    with running_cluster(tmp_path / "cluster", nodes=3, slurmd_timeout=10) as cluster:
        train(cluster, folders, f"run_dir={run}", "train.save_every=5")
        job = job_of(run)
        wait_for(cluster, job, run, lambda: steps_done(run) >= 7)
        cluster.lose_node(lost)
        begun = time.monotonic()
        cluster.wait(job, "PENDING", seconds=90)
        queued = time.monotonic() - begun
        ended = cluster.wait(job, *ENDED, seconds=120)
    print(f"queued again after {queued:.0f} s, done after {time.monotonic() - begun:.0f} s")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert ended["NodeList"] == others
    assert "continuing from step_" in (run / "logs" / "rank_0.log").read_text()
    assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preemption",
    ["GraceTime=30", "GraceTime=30 PreemptMode=CANCEL", "PreemptMode=CANCEL"],
    ids=["a grace", "for good after a grace", "for good"],
)
def test_a_run_that_slurm_preempts_saves_within_the_grace_and_goes_on(
    folders: Path, tmp_path: Path, whole: Path, preemption: str
) -> None:
    """A preempted run saves within the grace time, is requeued and continues."""
    partitions = (
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "KillWait=30",  # As by default, for what has no grace.
        f"PartitionName=low Nodes=ALL PriorityTier=1 {preemption}",
        "PartitionName=high Nodes=ALL PriorityTier=2",
    )
    run = tmp_path / "run"
    with running_cluster(tmp_path / "cluster", settings=partitions) as cluster:
        train(cluster, folders, f"run_dir={run}", "cluster.partition=low")
        job = job_of(run)
        wait_for(cluster, job, run, lambda: steps_done(run) >= 2)
        urgent = ("--partition=high", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null", "--wrap=sleep 1")
        cluster.call("sbatch", *urgent)
        cluster.wait(job, "PENDING", seconds=60)
        assert cluster.wait(job, "RUNNING", seconds=120)["PreemptTime"] == "None"
        # 24.11 calls a job that a grace for good has ended once PREEMPTED also after it has ended well.
        ended = cluster.wait(job, *ENDED, "PREEMPTED", seconds=120)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "1")
    assert "continuing from step_" in (run / "logs" / "rank_0.log").read_text()
    assert_same_run(run, whole)
