"""`distlora status` and `distlora cancel`: what they say of a run folder in every state, and whom they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.config import Config
from distlora.config.file import as_mapping, build
from distlora_launcher.cli.main import main
from distlora_launcher.launch.lock import from_record, host_name
from support.fake_slurm import FakeSlurm, job_record


def make(run_dir: Path, launcher: str = "local", **train: Any) -> Path:
    """Make a prepared run of 6 steps per epoch, two epochs."""
    values = {
        "model": {"path": "/models/base"},
        "data": {"path": "/data.jsonl", "sequence_length": 64},
        "train": {"epochs": 2, "global_batch": 8, **train},
        "cluster": {"launcher": launcher},
        "run_dir": str(run_dir),
    }
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(as_mapping(build(Config, values))))
    (run_dir / "data.json").write_text(json.dumps({"splits": {"train": {"rows": 41}}}))
    return run_dir


def trained(run_dir: Path, steps: int, *, ago: float = 10.0) -> None:
    """Write `steps` logged steps at 256 tokens/s, a truncated line and a checkpoint."""
    now = time.time() - ago
    lines = [{"step": 0, "time": now, "eval_loss": 3.0}]
    lines += [
        {"step": step, "time": now, "loss": 3 - step / 10, "tokens_per_second": 256.0, "peak_memory_bytes": 1.23e9}
        for step in range(1, steps + 1)
    ]
    lines += [{"step": steps, "time": now, "eval_loss": 2.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 99, "time"')
    folder = run_dir / "checkpoints" / f"step_{steps:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def submitted(run_dir: Path, job_id: str) -> None:
    (run_dir / "slurm.json").write_text(json.dumps({"job_id": job_id}))


def stopped(run_dir: Path, step: int, *, ago: float = 5.0) -> None:
    record = {"step": step, "checkpoint": f"checkpoints/step_{step:08d}", "signal": "SIGUSR1"}
    (run_dir / "stopped.json").write_text(json.dumps(record | {"time": time.time() - ago}))


def failed(run_dir: Path, *, ago: float = 5.0, bad_input: bool = False) -> None:
    error = {"type": "RuntimeError", "message": "out of luck", "bad_input": bad_input, "time": time.time() - ago}
    (run_dir / "logs" / "rank_1.error.json").write_text(json.dumps(error | {"traceback": ""}))


def status(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", str(run_dir), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def said(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["status", str(run_dir)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "run")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


HOLDER = """
import signal, sys, time
from pathlib import Path
from distlora_launcher.launch.lock import lock_run
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with lock_run(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the run, as its launcher does, and handles a request to stop."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_the_figures_of_the_objective_are_shown_as_the_run_logs_them(run: Path, capsys: pytest.CaptureFixture[str]):
    sampled = {"reward": 0.4125, "frac_reward_zero_std": 0.25, "rewards/failed": 2}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 0.5, **sampled, "rewards/math/mean": 0.1}) + "\n")
    assert "figures   loss 0.500 reward 0.412 equal groups 25% failed 2\n" in said(run, capsys)
    assert status(run, capsys)["objective"] == sampled


def test_a_local_run_is_found_by_who_holds_it_and_asked_to_stop(
    run: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
):
    trained(run, 4)
    found = status(run, capsys)
    assert (found["state"], found["step"], found["loss"], found["eval_loss"]) == ("running", 4, 2.6, 2.5)
    assert found["machines"] == [{"host": host_name(), "pid": holder.pid}]
    assert found["seconds_left"] == 8 * 8 * 64 / 256
    text = said(run, capsys)
    assert text.startswith(f"run is running on {host_name()} (pid {holder.pid})\nstep      4 of 12 (33%), 16 s left")
    assert "loss 2.600 eval_loss 2.500 256 tok/s mem 1.23 GB" in text
    assert main(["cancel", str(run)]) == 0
    assert "run is saving and stopping" in capsys.readouterr().out
    assert holder.wait(timeout=10) == 75
    assert status(run, capsys)["state"] == "ended"
    assert not (run / "machines").exists()
    assert main(["cancel", str(run)]) == 2
    assert "run has ended without a message" in capsys.readouterr().err


def test_cancel_now_kills_and_a_killed_holder_holds_nothing(
    run: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["cancel", str(run), "--now"]) == 0
    assert holder.wait(timeout=10) == -signal.SIGKILL
    assert (run / "machines" / "0.json").exists()
    assert status(run, capsys)["machines"] == []


def test_a_run_on_another_host_is_not_ended_from_here(
    run: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
):
    record = run / "machines" / "0.json"
    record.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid()}))  # The holder's lock is on it still.
    assert status(run, capsys)["state"] == "running"
    assert main(["cancel", str(run)]) == 2
    assert f"`ssh elsewhere kill -TERM {os.getpid()}`" in capsys.readouterr().err
    assert holder.poll() is None


def test_a_process_that_has_taken_the_pid_of_a_runs_is_not_ended(
    run: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
):
    """Check that a process with the pid of an ended launcher is not signalled."""
    record = run / "machines" / "0.json"
    written = json.loads(record.read_text())
    assert written["pid"] == holder.pid
    for other in ({"boot": "another"}, {"namespace": "pid:[1]"}):
        record.write_text(json.dumps(written | other))
        assert status(run, capsys)["state"] == "running"
        assert main(["cancel", str(run), "--now"]) == 2
        assert "another container" in capsys.readouterr().err
    record.write_text(json.dumps(written | {"started": written["started"] + 1}))
    assert status(run, capsys)["machines"] == []
    assert main(["cancel", str(run), "--now"]) == 2
    process = from_record(json.loads(record.read_text()))
    assert process is not None
    with pytest.raises(ProcessLookupError):
        process.send(signal.SIGKILL)
    assert holder.poll() is None


def test_the_later_of_a_stop_and_a_failure_is_how_a_run_ended(run: Path, capsys: pytest.CaptureFixture[str]):
    trained(run, 4)
    stopped(run, 4, ago=60)
    assert said(run, capsys).startswith("run has stopped after step 4, which is saved (on SIGUSR1, 60 s ago)")
    failed(run, ago=30)
    found = status(run, capsys)
    assert (found["state"], found["stopped"]) == ("failed", None)
    assert found["error"].startswith("rank 1 failed first: RuntimeError: out of luck")
    assert found["next"] == "distlora resume run"
    failed(run, ago=30, bad_input=True)
    assert status(run, capsys)["next"] is None, "a resume would be refused again"
    stopped(run, 4, ago=10)
    assert status(run, capsys)["state"] == "stopped"


def test_a_finished_run(run: Path, capsys: pytest.CaptureFixture[str]):
    trained(run, 12)
    (run / "adapter").mkdir()
    assert said(run, capsys).startswith("run is done: run/adapter\nstep      12 of 12 (100%)\n")
    assert status(run, capsys)["next"] == "distlora generate run"


def test_damaged_records_are_unknown_and_nothing_else_suffers(run: Path, capsys: pytest.CaptureFixture[str]):
    trained(run, 4)
    for name in ("data.json", "stopped.json", "slurm.json", "logs/rank_0.error.json"):
        for text in ('{"time": ', "[1, 2]", '{"time": "x", "step": {}, "job_id": 3, "splits": 1}', "\x00\xff"):
            (run / name).write_text(text)
            found = status(run, capsys)
            assert (found["step"], found["saved"]["step"]) == (4, 4)
    assert found["total_steps"] is None
    (run / "metrics.jsonl").write_bytes(b'\xff\xfe\n{"step": true}\n{"step": 2, "loss": NaN}\n[]\n')
    assert status(run, capsys)["step"] == 2


def test_a_job_is_followed_from_the_queue_to_its_end(run: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    submitted(run, "41")
    slurm.has_job("41", "PENDING", reason="Priority")
    found = status(run, capsys)
    assert (found["state"], found["job"]["reason"]) == ("queued", "Priority")
    assert "run is queued as SLURM job 41 (Priority)" in said(run, capsys)
    trained(run, 4)
    slurm.has_job("41", "RUNNING", nodes="n[1-2]", restarts="2")
    text = said(run, capsys)
    assert text.startswith(
        "run is running as SLURM job 41 on n[1-2], started again 2 times\nstep      4 of 12 (33%), 16 s"
    )
    stopped(run, 4)
    slurm.has_job("41", "PENDING", reason="BeginTime", restarts="3")
    assert "has stopped after step 4, which is saved" in said(run, capsys)
    assert status(run, capsys)["state"] == "queued"
    slurm.has_job("41", "FAILED", exit_code="75:0")
    assert status(run, capsys)["state"] == "stopped"
    (run / "stopped.json").unlink()
    slurm.has_job("41", "OUT_OF_MEMORY", exit_code="0:9", reason="OutOfMemory")
    assert said(run, capsys).startswith("run has ended as SLURM job 41, OUT_OF_MEMORY with code 137, OutOfMemory\n")


def test_what_slurm_has_forgotten_accounting_may_know(run: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    submitted(run, "41")
    trained(run, 4)
    slurm.forgets()
    assert status(run, capsys)["job"] is None
    slurm.answers("sacct", "41|CANCELLED by 1000|0:15|n[1-2]")
    found = status(run, capsys)
    assert (found["job"]["state"], found["job"]["exit_code"], found["state"]) == ("CANCELLED", 143, "ended")
    slurm.refuses("scontrol", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    text = said(run, capsys)
    assert "SLURM does not answer" in text
    assert "step      4 of 12" in text


def test_a_job_is_cancelled_with_a_save_or_at_once(run: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    submitted(run, "41")
    slurm.has_job("41", "RUNNING", nodes="n1")
    assert main(["cancel", str(run)]) == 0
    assert slurm.asked[-2:] == ["scontrol update JobId=41 Requeue=0", "scancel --ctld --batch --signal=USR1 41"]
    assert main(["cancel", str(run), "--now"]) == 0
    assert slurm.asked[-1] == "scancel 41"
    slurm.has_job("41", "PENDING")
    assert main(["cancel", str(run)]) == 0
    assert slurm.asked[-1] == "scancel 41"
    slurm.has_job("41", "COMPLETED")
    assert main(["cancel", str(run)]) == 2


def test_a_sweep_is_listed_and_cancelled_as_a_whole(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "sweep"
    for number in (0, 1, 2, 10):
        submitted(make(sweep / str(number), "slurm"), f"41_{number}")
    submitted(sweep, "41")
    trained(sweep / "0", 12)
    (sweep / "0" / "adapter").mkdir()
    trained(sweep / "1", 4)
    slurm.has_jobs(
        job_record("41_0", "COMPLETED"), job_record("41_1", "RUNNING", nodes="n1"), job_record("41_2-10%2", "PENDING")
    )
    capsys.readouterr()
    assert main(["status", "sweep"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:5]] == [
        ["0", "done", "12/12"],
        ["1", "running", "4/12"],
        ["2", "queued", "0/12"],
        ["10", "queued", "0/12"],
    ]
    assert [line for line in slurm.asked if line.startswith("scontrol")] == ["scontrol show job --oneliner 41"]
    assert main(["cancel", "sweep"]) == 0
    assert slurm.asked[-3:] == [
        "scancel 41_2 41_10",
        "scontrol update JobId=41_1 Requeue=0",
        "scancel --ctld --batch --signal=USR1 41_1",
    ]
    assert main(["cancel", "sweep/1"]) == 0
    assert slurm.asked[-1] == "scancel --ctld --batch --signal=USR1 41_1"
