"""What a run on one node listens on: loopback, and nothing else."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from distlora.system.listening import listen
from support.launcher_fakes import wait_until
from support.measured import free_port

LISTENS = "0A"
"""TCP_LISTEN in /proc/net/tcp."""


class Listener(NamedTuple):
    """A socket that accepts connections."""

    process: str
    """Pid and command line."""
    address: str
    port: int

    @property
    def is_open(self) -> bool:
        """True if it accepts connections of other machines."""
        return not ipaddress.ip_address(self.address).is_loopback


def listeners(pid: int) -> list[Listener]:
    """Return the TCP listeners of a process and all its descendants, each in its own network namespace."""
    found: list[Listener] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(OSError, psutil.Error):  # It has ended.
                found += _of_process(process)
    return found


def _of_process(process: psutil.Process) -> list[Listener]:
    folder = Path("/proc", str(process.pid))
    sockets = set()
    for name in os.listdir(folder / "fd"):
        with contextlib.suppress(OSError):  # It was closed.
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(folder / "fd" / name))
            sockets |= {match[1]} if match else set()
    rows = [row.split() for table in ("tcp", "tcp6") for row in (folder / "net" / table).read_text().splitlines()[1:]]
    name = f"{process.pid} {' '.join(process.cmdline())}"
    return [Listener(name, *_endpoint(row[1])) for row in rows if row[3] == LISTENS and row[9] in sockets]


def _endpoint(text: str) -> tuple[str, int]:
    """Return (address, port) of hexadecimal digits: the address in 32-bit words of the host's byte order."""
    words, port = text.split(":")
    data = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    address = ipaddress.ip_address(data)
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1 takes IPv4 connections to loopback.
    return str(mapped or address), int(port, 16)


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


@pytest.mark.ci
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


@pytest.mark.slow
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
