"""Workers under the launcher's agent: the first rank to fail is named, signals reach them, none is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from distlora_launcher.launch import agent
from distlora_launcher.launch.failures import first_failure, read_errors
from distlora_launcher.launch.workers import IMPORTS, run_workers
from support.launcher_fakes import wait_until
from support.small_disks import small_disk

HERE = Path(__file__).parents[1]
WORKER = "support.launcher_fake_worker"


@pytest.fixture(autouse=True)
def no_lines_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print no line about a slow start, which depends on the machine's load."""
    monkeypatch.setattr(agent, "STILL_SECONDS", 600)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def run(run_dir: Path, behaviour: str, *, processes: int = 2, max_restarts: int = 0) -> int:
    (run_dir / "behaviour").write_text(behaviour)
    return run_workers(run_dir, processes=processes, worker_module=WORKER, max_restarts=max_restarts)


def test_rank_0_is_shown_and_every_rank_has_a_log(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (run_dir / "stopped.json").write_text("of an earlier start")  # Which does not count.
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank_0.log").write_text("the first start")
    monkeypatch.setattr(agent, "STILL_SECONDS", 0.0)
    assert run(run_dir, "environment") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("hello from rank 0 of 2\nOMP_NUM_THREADS=")
    assert "rank 1" not in shown.out
    waits = shown.err.splitlines()
    assert waits, "a silent start says that it goes on"
    assert {line[: line.index("(")] for line in waits} == {"still starting the workers "}
    for rank in (0, 1):
        log = (run_dir / "logs" / f"rank_{rank}.log").read_text()
        assert f"hello from rank {rank} of 2" in log
        assert f"warning from rank {rank}" in log
    assert (run_dir / "logs" / "start_1" / "rank_0.log").read_text() == "the first start"
    assert f"OMP_NUM_THREADS={max(len(os.sched_getaffinity(0)) // 2, 1)}" in log
    assert "MALLOC_TRIM_THRESHOLD_=8000000000" in log
    assert "OMP_WAIT_POLICY=PASSIVE" in log
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in log


@pytest.mark.ci
def test_the_first_rank_to_fail_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert run(run_dir, "rank 1 raises") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: rank 1 failed first: RuntimeError: no more memory in rank one")
    assert str(run_dir / "logs" / "rank_1.log") in message
    assert "Traceback" not in message
    assert_no_workers(run_dir)


def test_a_user_error_in_a_worker_is_bad_input_and_no_reason_to_start_again(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(run_dir, "bad input", max_restarts=3) == 2
    assert capsys.readouterr().err == "error: the adapter has no such thing; write another\n"
    # Both ranks raise; of the one that comes second nothing may be left, since the first ends the run.
    assert any("Traceback" in log.read_text() for log in (run_dir / "logs").glob("rank_*.log"))


@pytest.mark.ci
def test_the_reason_is_known_where_the_disk_takes_not_even_that(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    with small_disk(tmp_path / "disk", kib=256) as disk:
        assert run(disk, "the disk is full", processes=1, max_restarts=3) == 1
        message = capsys.readouterr().err
        assert "failed first: SaveError: no space left for step 3\n" in message
        assert "restart" not in message
        assert not any((disk / "logs").glob("*.tmp-*"))


def start_launcher(
    run_dir: Path, behaviour: str, *, max_restarts: int = 0, under: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a launcher process and wait until both ranks have started. under: a command to run it with."""
    (run_dir / "behaviour").write_text(behaviour)
    code = (
        "import sys; from pathlib import Path; from distlora_launcher.launch import agent, workers; "
        "agent.STILL_SECONDS = 600; "
        f"sys.exit(workers.run_workers(Path({str(run_dir)!r}), processes=2, worker_module={WORKER!r}, "
        f"max_restarts={max_restarts}))"
    )
    command = [*under, sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: all((run_dir / f"pid_{rank}").exists() for rank in (0, 1)))
    return process


def assert_no_workers(run_dir: Path) -> None:
    def alive() -> list[int]:
        pids = [int(path.read_text() or 0) for path in run_dir.glob("pid_*")]
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]

    wait_until(lambda: not alive(), seconds=10)


@pytest.mark.ci
def test_nohup_and_a_second_ctrl_c(run_dir: Path):
    """Check that a launcher under nohup ignores SIGHUP and that a second Ctrl-C kills."""
    process = start_launcher(run_dir, "waits", under=["nohup"])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process.send_signal(signum)
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.startswith("killed by SIGINT; logs are in ")
    asked = (run_dir / "logs" / "rank_1.log").read_text()
    assert "SIGTERM from process" in asked, "the first request, and so the only one that is passed on"
    assert_no_workers(run_dir)


def test_workers_start_again_after_a_kill_and_save_on_a_request(run_dir: Path):
    (run_dir / "stopped.json").write_text("of an earlier start")
    (run_dir / "checkpoints" / "step_00000012").mkdir(parents=True)
    process = start_launcher(run_dir, "rank 1 is killed once", max_restarts=3)
    wait_until(lambda: all((run_dir / f"ready_{rank}").exists() for rank in (0, 1)))
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads((run_dir / "stopped.json").read_text()) == {}, "the workers' own"
    (line,) = message.splitlines()
    assert line.startswith("rank 1 failed first: it was killed by SIGKILL")
    assert line.endswith("; restart 1 of 3, from step_00000012")
    logs = run_dir / "logs"
    assert {path.name for path in logs.iterdir()} - {"torchrun.log"} == {"attempt_1", "rank_0.log", "rank_1.log"}
    assert json.loads((logs / "attempt_1" / "rank_1.error.json").read_text())["type"] == "Killed"
    for log in (logs / "rank_0.log", logs / "rank_1.log", logs / "attempt_1" / "rank_1.log"):
        assert log.read_text().count("hello from rank") == 1
    assert "SIGTERM from process" in (logs / "rank_1.log").read_text()
    assert_no_workers(run_dir)


def test_a_request_while_a_worker_dies_is_answered_by_the_launcher_or_the_next_workers(run_dir: Path):
    (run_dir / "checkpoints" / "step_00000012").mkdir(parents=True)
    process = start_launcher(run_dir, "rank 1 is killed once", max_restarts=3)
    wait_until((run_dir / "dying").exists)
    process.send_signal(signal.SIGUSR1)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert message.startswith("rank 1 failed first: it was killed by SIGKILL")
    stopped = json.loads((run_dir / "stopped.json").read_text())
    if stopped:  # The launcher's, as the next workers had not started yet.
        assert (stopped["step"], stopped["signal"]) == (12, "SIGUSR1")
        assert "stopped by SIGUSR1 while no workers ran on " in message
    assert_no_workers(run_dir)


def test_killing_the_launcher_leaves_no_workers(run_dir: Path):
    process = start_launcher(run_dir, "waits")
    process.kill()
    process.communicate(timeout=60)
    assert_no_workers(run_dir)


COMMAND = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Request:
    folder: str

def main(request: Request) -> int:
    Path(request.folder, "pid_0").write_text(str(os.getpid()))
    signal.pause()
"""


def test_a_command_of_one_process_ends_with_its_launcher(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    (run_dir / "command.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", str(run_dir), prepend=os.pathsep)
    code = (
        "from command import Request; from distlora_launcher.launch.workers import run_alone; "
        f"run_alone('command:main', Request({str(run_dir)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as launcher:
        wait_until(lambda: (run_dir / "pid_0").exists() and (run_dir / "pid_0").read_text())
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) == -signal.SIGTERM
    assert_no_workers(run_dir)


@pytest.mark.ci
def test_on_a_terminal_rank_0_writes_to_a_terminal(run_dir: Path):
    (run_dir / "behaviour").write_text("terminal")
    code = (
        "import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', "
        "'from pathlib import Path; from distlora_launcher.launch.workers import run_workers; "
        f'raise SystemExit(run_workers(Path("{run_dir}"), processes=1, worker_module="{WORKER}"))\']) >> 8)'
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert "is a terminal: True" in ended.stdout, ended.stderr
    assert "is a terminal: True" in (run_dir / "logs" / "rank_0.log").read_text()


def test_the_earliest_error_wins(tmp_path: Path):
    for rank, when in ((0, 2.5), (1, 2.4), (2, 2.6)):
        text = f'{{"type": "E{rank}", "message": "", "bad_input": false, "time": {when}, "traceback": ""}}'
        (tmp_path / f"rank_{rank}.error.json").write_text(text)
    failure = first_failure(tmp_path, {}, [error for _, error in read_errors(tmp_path)])
    assert failure is not None
    assert failure.message.startswith("rank 1 failed first: E1\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "OutOfMemoryError",
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB. See documentation",
        ),
        (
            "RuntimeError",
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
        ),
    ],
)
def test_who_has_too_little_memory_is_told_what_takes_less(tmp_path: Path, kind: str, said: str):
    record = {"type": kind, "message": said, "bad_input": False, "time": 1.0}
    (tmp_path / "rank_0.error.json").write_text(json.dumps(record))
    failure = first_failure(tmp_path, {}, [error for _, error in read_errors(tmp_path)])
    assert failure is not None
    assert "llocate" in failure.reason
    assert "See documentation" not in failure.reason
    assert failure.reason.partition("; to need less memory, set ")[2].startswith(
        "train.checkpointing=block, train.micro_batch=1"
    )


@pytest.mark.ci
def test_a_reader_that_leaves_does_not_end_the_run(run_dir: Path):
    """`distlora train ... | head -1`: the run goes on, and its logs have the rest."""
    (run_dir / "behaviour").write_text("success")
    script = (
        "import sys, time; from pathlib import Path; from distlora_launcher.launch.workers import run_workers;"
        "from distlora_launcher.terminal.output import show;"
        "show('first\\n'); time.sleep(0.5); show('x' * 100000);"
        f"sys.exit(10 + run_workers(Path({str(run_dir)!r}), processes=1, worker_module={WORKER!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    assert process.wait(timeout=120) == 10
    assert "hello from rank 0 of 1" in (run_dir / "logs" / "rank_0.log").read_text()


def test_all_modules_that_the_launcher_imports_for_workers_exist():
    """A name that is gone would only cost each worker its seconds again."""
    assert all(importlib.util.find_spec(name) is not None for name in IMPORTS)
