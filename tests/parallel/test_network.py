"""What a run on one node listens on: loopback, and nothing else."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from distlora.system.listening import listen
from support.launcher_fakes import wait_until
from support.listeners import Listener, listeners
from support.measured import free_port

DISTLORA = [sys.executable, "-m", "distlora_launcher.cli.main"]


def watched(command: list[object], folder: Path, meanwhile: Callable[[int], None] = lambda _: None) -> set[Listener]:
    """Run a command of distlora to its end, which must be good; return all on which its processes listened."""
    seen: set[Listener] = set()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*DISTLORA, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=folder,
        )
    try:
        while process.poll() is None:
            seen |= set(listeners(process.pid))
            meanwhile(process.pid)
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (folder / "log").read_text()
    return seen


def open_ones(seen: set[Listener]) -> list[Listener]:
    return sorted(listener for listener in seen if listener.is_open)


def test_the_launcher_of_one_node_listens_on_no_port(tmp_path: Path):
    """Torch's agent unpickles what its store holds: by a port, whoever reaches it could run code as the user."""
    assert listeners_of_waiting_workers(tmp_path, "None") == []


def test_the_store_of_several_nodes_listens_on_the_endpoints_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It listens everywhere only if the node knows its own name as loopback, which is no address of other nodes."""
    port = free_port()
    values = f"nodes=1, endpoint='127.0.0.5:{port}', run_id='a', join_seconds=60, is_host=True, address='127.0.0.5'"
    found = listeners_of_waiting_workers(tmp_path, f"Rendezvous({values})")
    assert {(listener.address, listener.port) for listener in found} == {("127.0.0.5", port)}
    with listen("localhost", 0) as local:
        assert ipaddress.ip_address(local.getsockname()[0]).is_loopback
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    ]  # As for a host's name with Debian's /etc/hosts.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with listen("node1", 0) as everywhere:
        assert ipaddress.ip_address(everywhere.getsockname()[0]).is_unspecified


def listeners_of_waiting_workers(run_dir: Path, rendezvous: str) -> list[Listener]:
    (run_dir / "behaviour").write_text("waits")
    code = (
        "import sys; from pathlib import Path; from distlora_launcher.launch.workers import run_workers\n"
        "from distlora_launcher.launch.rendezvous import Rendezvous\n"
        f"worker, run_dir, rendezvous = 'support.launcher_fake_worker', Path({str(run_dir)!r}), {rendezvous}\n"
        "run_workers(run_dir, processes=2, worker_module=worker, rendezvous=rendezvous)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    (run_dir / "logs").mkdir()
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            wait_until(lambda: all((run_dir / f"pid_{rank}").exists() for rank in range(2)))
            return listeners(process.pid)
        finally:
            process.kill()


@pytest.mark.ci
def test_a_run_on_one_node_listens_on_loopback_only(folders: Path, tmp_path: Path):
    """It trains on two ranks of which one is killed, starts again, and is evaluated by two ranks."""
    run_dir, killed = tmp_path / "run", set[int]()

    def kill_a_rank(pid: int) -> None:
        if not killed and (run_dir / "checkpoints" / "step_00000002").exists():
            rank = max(child.pid for child in psutil.Process(pid).children(recursive=True))
            os.kill(rank, signal.SIGKILL)
            killed.add(rank)

    words = {
        "model.path": folders / "llama",
        "data.path": folders / "text.jsonl",
        "data.sequence_length": 64,
        "data.cache_dir": tmp_path / "cache",
        "cluster.gpus_per_node": 2,
        "train.max_steps": 6,
        "train.save_every": 1,
        "train.dtype": "fp32",
        "tracker": "none",
        "run_dir": run_dir,
    }
    seen = watched(["train", *(f"{name}={value}" for name, value in words.items())], tmp_path, kill_a_rank)
    assert killed
    assert list((run_dir / "logs").glob("attempt_1*"))
    assert len(seen) > 3, "the ranks' store and gloo's sockets"
    assert open_ones(seen) == []
    evaluation = ["eval", run_dir, "--text", folders / "text.jsonl", "--processes", 2, "--dtype", "fp32"]
    seen = watched(evaluation, tmp_path)
    assert len(seen) > 3
    assert open_ones(seen) == []
