"""Who holds a run or is a worker of a sweep: what a newcomer waits for, and what it is refused by."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora_launcher.launch import lock
from distlora_launcher.launch.lock import this_process
from distlora_launcher.launch.rendezvous import Rendezvous

NODES = Rendezvous(nodes=2, endpoint="127.0.0.1:1", run_id="1", join_seconds=1, is_host=True, address="127.0.0.1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder with the files that locks need."""
    (tmp_path / "config.yaml").touch()
    return tmp_path


@pytest.fixture
def looked_at(run: Path) -> Iterator[None]:
    """Somebody asks all the time who holds the run."""
    ended = threading.Event()
    looks: list[int] = []
    errors: list[OSError] = []

    def look() -> None:
        while not ended.is_set():
            try:
                looks.append(len(lock.holders(run)))
            except OSError as error:
                errors.append(error)

    looking = threading.Thread(target=look)
    looking.start()
    yield
    ended.set()
    looking.join()
    assert errors == []
    assert {0, 1} <= set(looks)


@pytest.mark.usefixtures("looked_at")
def test_a_run_that_is_looked_at_can_be_taken_at_once(run: Path, capsys: pytest.CaptureFixture[str]):
    for _ in range(50):
        with lock.lock_run(run):
            pass
    assert "waiting" not in capsys.readouterr().out


def test_a_run_of_a_machine_that_is_gone_is_taken_once_its_locks_are_lost(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """NFS holds them for its lease."""
    (run / "machines").mkdir()
    record = run / "machines" / "0.json"
    gone = dataclasses.replace(this_process(), host="node7", boot="another")
    record.write_text(json.dumps(dataclasses.asdict(gone)))
    with record.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with monkeypatch.context() as impatient:
            impatient.setattr(lock, "LEASE_SECONDS", 0.2)
            with pytest.raises(UserError, match="is already running on node7"), lock.lock_run(run):
                pass
        assert "waiting for node7 to leave" in capsys.readouterr().out
        lease = threading.Timer(0.5, fcntl.flock, (file, fcntl.LOCK_UN))
        lease.start()
        with lock.lock_run(run):
            pass
        lease.join()


def test_a_worker_that_lives_here_keeps_its_place(run: Path):
    with lock.worker_place(run, "worker_0"):
        began = time.monotonic()
        with pytest.raises(UserError, match="already has a running worker_0"), lock.worker_place(run, "worker_0"):
            pass
        assert time.monotonic() - began < 1


def test_a_node_that_changes_the_settings_is_no_file_system_without_locks(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    with (run / "config.yaml").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with lock.lock_run(run, NODES):
            pass
    assert "without locks" not in capsys.readouterr().err
