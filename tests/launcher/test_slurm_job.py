"""The script of a job, run by bash: what it makes of signals, of how its step ends, and of what SLURM says of it then.

SLURM's commands are stand-ins (`fake_slurm.py`), srun with what becomes of a run in it: `test_slurm_cluster.py` has the
whole on a real SLURM, which says what the records here say.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distlora.config import Config
from distlora.config.file import build
from distlora_launcher.jobs.script import render
from support.fake_slurm import FakeSlurm

STOPS = 'touch "$STOPPED"'
SAVES = 'mkdir -p "$RUN/checkpoints/step_$(printf %08d $RANDOM)"'
RUNNING = "JobState=RUNNING Reason=None Requeue=1 PreemptTime=None"


class Job:
    """A run's job: each start runs its script to the end."""

    def __init__(self, folder: Path, slurm: FakeSlurm, **cluster: Any) -> None:
        self.run_dir, self.slurm = folder / "run", slurm
        (self.run_dir / "logs").mkdir(parents=True)
        values = {
            "model": {"path": "/models/base"},
            "data": {"path": "/data.jsonl"},
            "cluster": {"launcher": "slurm", **cluster},
            "run_dir": str(self.run_dir),
        }
        self.script = self.run_dir / "job.sbatch"
        self.script.write_text(render(build(Config, values), gpus=False))
        self.starts = 0
        self.is_said_to_be(RUNNING)

    def is_said_to_be(self, record: str, *, partition: str = "PreemptMode=REQUEUE", requeue: str = "exit 0") -> None:
        """Set what scontrol shows of the job and its partition, and how it answers a requeue."""
        self.slurm.does(
            "scontrol",
            f"""case "$*" in
                *hostnames*) echo n1 ;;
                *"show job"*) echo "JobId=41 {record} NodeList=n1" ;;
                *"show partition"*) echo "PartitionName=low {partition}" ;;
                *requeue*) {requeue} ;;
            esac""",
        )

    def start(self, step: str) -> tuple[int, str]:
        """(exit code, what it printed) of a start whose step does `step`."""
        self.slurm.does("srun", step)
        environment = os.environ | {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_PARTITION": "low"}
        if self.starts > 0:
            environment["SLURM_RESTART_COUNT"] = str(self.starts)
        self.starts += 1
        with_pid = f'echo $$ > {self.slurm.folder}/pid; exec bash "$0"'
        ended = subprocess.run(
            ["bash", "-c", with_pid, self.script], env=environment, capture_output=True, text=True, timeout=60
        )
        return ended.returncode, ended.stdout + ended.stderr

    @property
    def requeues(self) -> int:
        return self.slurm.asked.count("scontrol requeue 41")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, FakeSlurm(tmp_path / "slurm", monkeypatch))


def test_a_job_that_stops_is_queued_again_as_long_as_it_saves_something(job: Job):
    for number in range(1, 4):
        code, said = job.start(f"{SAVES}-{number}; {STOPS}")
        assert (code, job.requeues) == (75, number)
        assert "saved and stopped; queued again" in said
    assert list((job.run_dir / "logs").glob("slurm_*")) == []


def test_a_job_that_saves_nothing_twice_in_a_row_is_not_queued_for_ever(job: Job):
    code, said = job.start(STOPS)
    assert (code, job.requeues) == (75, 1)
    assert "stopped before anything was saved; queued again" in said
    job.start(f"{SAVES}; {STOPS}")  # Progress, after which one start in vain is nothing yet.
    assert job.requeues == 2
    job.start(STOPS)
    assert job.requeues == 3
    code, said = job.start(STOPS)
    assert (code, job.requeues) == (75, 3)
    assert "not queued again" in said
    assert "cluster.time_limit" in said
    assert f"distlora resume {job.run_dir}" in said
    job.starts = 0  # Submitted by a person, it has its one start in vain again.
    assert job.start(STOPS)[0] == 75
    assert job.requeues == 4


def test_a_signal_before_the_step_starts_reaches_the_step(job: Job):
    """It comes as srun is being started, while the script sleeps for a moment."""
    job.slurm.does("sleep", 'kill -USR1 $(cat pid); exec /usr/bin/sleep "$1"')
    code, said = job.start(f"trap '{STOPS}; exit 0' USR1; for _ in $(seq 50); do /usr/bin/sleep 0.1; done; exit 3")
    assert code == 75, said
    assert not list((job.run_dir / "logs").glob("slurm_stopped*"))


def test_a_machine_that_fails_ends_the_job_whatever_the_others_have_saved(job: Job):
    code, _ = job.start(f"{SAVES}; {STOPS}; exit 1")
    assert (code, job.requeues) == (1, 0)
    assert list((job.run_dir / "logs").glob("slurm_stopped*")) == []


@pytest.mark.parametrize(
    ("record", "partition", "requeues"),
    [
        (RUNNING.replace("Requeue=1", "Requeue=0"), "PreemptMode=REQUEUE", 0),
        ("JobState=COMPLETING Reason=None Requeue=1 PreemptTime=None", "PreemptMode=REQUEUE", 0),
        ("JobState=COMPLETING Reason=TimeLimit Requeue=1 PreemptTime=None", "PreemptMode=REQUEUE", 1),
        ("JobState=COMPLETING Reason=None Requeue=1", "PreemptMode=REQUEUE", 0),
        ("JobState=COMPLETING Reason=None Requeue=1 PreemptTime=2026-11-25T16:10:39", "PreemptMode=CANCEL", 1),
        ("JobState=RUNNING Reason=None Requeue=1 PreemptTime=2026-11-25T16:10:23", "PreemptMode=REQUEUE", 0),
        ("JobState=RUNNING Reason=None Requeue=1 PreemptTime=2026-11-25T16:10:23", "PreemptMode=CANCEL", 1),
    ],
    ids=[
        "distlora cancel",
        "scancel",
        "a save beyond the time limit",
        "preempted",
        "preempted for good",
        "preempted with a grace",
        "preempted for good with a grace",
    ],
)
def test_who_queues_a_job_again_is_known_from_what_slurm_says_of_it(
    record: str, partition: str, requeues: int, job: Job
):
    job.is_said_to_be(record, partition=partition)
    code, _ = job.start(f"{SAVES}; {STOPS}")
    assert (code, job.requeues) == (75, requeues)


def test_a_job_that_slurm_does_not_queue_again_says_so(job: Job):
    job.is_said_to_be(RUNNING, requeue="echo 'Requeue is disabled' >&2; exit 1")
    code, said = job.start(f"{SAVES}; {STOPS}")
    assert code == 75
    assert "queued again, to continue" not in said
    assert f"continue with: distlora resume {job.run_dir}" in said
