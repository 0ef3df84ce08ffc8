"""Trials on the nodes of a running job: exit codes and requests to stop.

The job is bash; `test_sweep_arrays.py` has a real one.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from distlora_launcher.jobs.submit import STEP, in_job, run_step


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ('touch "$STOPPED"; exit 0', 75),  # A machine that saved and stopped ends well, as far as srun knows.
        ('touch "$STOPPED"; exit 1', 1),  # A machine that failed decides.
        ("exit 2", 2),
        ("kill -KILL $$", 137),
        ("kill -USR1 $$", 138),  # Not asked to stop by us: what else has ended it is a failure.
    ],
)
def test_the_exit_code_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: int) -> None:
    assert not in_job()
    monkeypatch.setenv(STEP, script)
    assert in_job()
    assert run_step(tmp_path) == code
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("answers", [True, False], ids=["saves", "has no Python yet"])
def test_a_request_to_stop_reaches_the_step_as_usr1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    trap = """trap 'touch "$STOPPED"; exit 0' USR1;""" if answers else ""
    monkeypatch.setenv(STEP, f"{trap} for i in {{1..300}}; do sleep 0.1; done; exit 7")
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_step(tmp_path) == 75
    timer.join()


def test_starts_of_two_trials_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP, 'echo "$START" > "$RUN/start"')
    monkeypatch.setenv("START", "41.0")
    for name in ("0000", "0001"):
        (tmp_path / name).mkdir()
        assert run_step(tmp_path / name) == 0
    starts = [(tmp_path / name / "start").read_text() for name in ("0000", "0001")]
    assert len(set(starts)) == 2
    assert all(start.startswith("41.0.000") for start in starts)
