"""Runs of several machines: two on this host, which meet on its loopback, under torch's agent."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from distlora.config import Config, UserError
from distlora.config.file import as_mapping, build, load_config, settings_by_name
from distlora_launcher.cli.main import main
from distlora_launcher.launch import lock, rendezvous
from distlora_launcher.launch.failures import read_gave_up
from distlora_launcher.launch.local import check_same_settings, start_on_each_node
from support.closeness import assert_same_run
from support.launcher_fakes import wait_until, write_data, write_model
from support.measured import free_port

PATHS = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
DISTLORA = [sys.executable, "-m", "distlora_launcher.cli.main"]


class Machine:
    """One command of several, in a process of its own, and what it says."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {"PYTHONPATH": PATHS, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
                | environment,
            )

    def says(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self._log.name} did not end; it says:\n{self.says()}")

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if any(Path(file.path).name.startswith("rank_") for file in child.open_files()):
                    found.append(child)
        return found


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Yield the nodes of a test; at its end kill the rest, with their workers."""
    running: list[Machine] = []
    yield running
    for machine in running:
        if machine.process.poll() is None:
            machine.process.kill()
            machine.process.wait()


def fake_run(run_dir: Path, behaviour: str, **cluster: object) -> None:
    """Make a prepared run of two nodes whose workers behave as named (launcher_fake_worker.py)."""
    (run_dir / "cache").mkdir(parents=True)
    values = {"launcher": "torchrun", "nodes": 2, "rdzv_endpoint": f"127.0.0.2:{free_port()}", "timeout_seconds": 60.0}
    config = build(
        Config,
        {
            "model": {"path": str(run_dir)},
            "data": {"path": str(run_dir)},
            "cluster": values | cluster,
            "run_dir": str(run_dir),
        },
    )
    (run_dir / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
    (run_dir / "data.json").write_text(json.dumps({"cache": str(run_dir / "cache")}))
    (run_dir / "behaviour").write_text(behaviour)


PART = (
    "import functools, sys; from pathlib import Path; from distlora.system.exit_codes import run_to_exit_code; "
    "from distlora.config.file import load_config; from distlora.system.stop_signals import forwarding; "
    "from distlora_launcher.launch import local\n"
    "local.run_workers = functools.partial(local.run_workers, worker_module='support.launcher_fake_worker')\n"
    "run = Path(sys.argv[1])\n"
    "cluster = load_config(run).cluster\n"
    "with forwarding() as forwarder:\n"
    "    part = lambda: local.run_node(run, cluster, local.find_rendezvous(run, cluster), forwarder, lambda: 0)\n"
    "    code = run_to_exit_code(part)\n"
    "sys.exit(code)\n"
)
"""`distlora resume` on one machine, of a run whose model and data nobody needs."""


def part(run_dir: Path, log: Path) -> Machine:
    return Machine([sys.executable, "-c", PART, str(run_dir)], log)


@pytest.mark.ci
def test_two_machines_are_one_run_and_a_third_is_too_many(
    tmp_path: Path, machines: list[Machine], monkeypatch: pytest.MonkeyPatch
):
    run_dir = tmp_path / "run"
    fake_run(run_dir, "saves when asked to stop")
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank_1.log").write_text("of the start before")
    machines += [part(run_dir, tmp_path / f"machine_{number}") for number in range(2)]
    wait_until(lambda: all((run_dir / f"ready_{rank}").exists() for rank in range(2)))
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0)
    cluster = load_config(run_dir).cluster
    assert cluster.rdzv_endpoint is not None
    start = json.loads((run_dir / "machines" / "0.json").read_text())["start"]
    this = rendezvous.make_rendezvous(cluster.rdzv_endpoint, nodes=2, run_id=start, join_seconds=0)
    for other, reason in (
        (this, "already runs on its 2 nodes: "),
        (dataclasses.replace(this, is_host=False), r"is already running on this node \(pid \d+\)"),
        (dataclasses.replace(this, is_host=True), r"is already running on this node \(pid \d+\)"),
        (dataclasses.replace(this, run_id="another", endpoint="127.0.0.3:9"), "is already running on "),
    ):
        with pytest.raises(UserError, match=reason), lock.lock_run(run_dir, other, lambda: False):
            pytest.fail("joined")
    machines[0].process.send_signal(signal.SIGUSR1)
    machines[1].process.send_signal(signal.SIGUSR1)
    assert [machine.wait() for machine in machines] == [75, 75]
    said = [machine.says() for machine in machines]
    assert sum("hello from rank 0 of 2" in text for text in said) == 1
    assert sum("rank 1 runs on" in text and str(run_dir / "logs" / "rank_0.log") in text for text in said) == 1
    host = socket.gethostname().partition(".")[0]
    names = {path.name for path in (run_dir / "logs").iterdir()} - {f"torchrun_{host}.log"}
    assert names == {"rank_0.log", "rank_1.log", "start_1"}
    assert (run_dir / "logs" / "start_1" / "rank_1.log").read_text() == "of the start before"


@pytest.mark.ci
def test_a_request_to_stop_is_answered_where_no_workers_are(tmp_path: Path, machines: list[Machine]):
    """The other machine has not come, or left: nobody is there who could save, and what is saved is saved."""
    run_dir = tmp_path / "run"
    fake_run(run_dir, "waits")
    (run_dir / "checkpoints" / "step_00000012").mkdir(parents=True)
    machines.append(part(run_dir, tmp_path / "alone"))
    port = int(str(load_config(run_dir).cluster.rdzv_endpoint).rpartition(":")[2])
    wait_until(lambda: listens(port))
    machines[0].process.send_signal(signal.SIGUSR1)
    assert machines[0].wait(60) == 75
    assert "stopped by SIGUSR1 while no workers ran on" in machines[0].says()
    record = json.loads((run_dir / "stopped.json").read_text())
    assert (record["step"], record["checkpoint"], record["signal"]) == (12, "checkpoints/step_00000012", "SIGUSR1")
    others = read_gave_up(run_dir / "logs")
    assert others is not None
    assert others.code == 75


def test_nothing_is_left_of_a_run_whose_data_cannot_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_dir = tmp_path / "run"
    fake_run(run_dir, "success")
    config = load_config(run_dir)
    model = dataclasses.replace(config.model, path=str(write_model(tmp_path / "model")))
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, sequence_length=64))
    for name in ("config.yaml", "data.json", "behaviour"):
        (run_dir / name).unlink()
    (run_dir / "cache").rmdir()
    another = run_dir / f".config.yaml.{os.getpid()}"  # Of a container with the same pids.
    another.write_text("half of its sett")
    monkeypatch.setattr("distlora_launcher.launch.local.prepare", lambda *_, **__: 2)
    assert start_on_each_node(config) == 2
    assert [path.name for path in run_dir.iterdir()] == [another.name]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], "and by default it has the time in its name, which differs between the 2 nodes (cluster.nodes); add "),
        (["run_dir=runs/a", "-m"], "-m with cluster=torchrun over 2 nodes (cluster.nodes): the nodes would not run"),
        (["run_dir=runs/a", "cluster.rdzv_endpoint=no.such.host.invalid:29500"], "cannot resolve the host no.such."),
    ],
)
def test_what_machines_cannot_do_together_is_refused(
    settings: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    command = ["train", "model.path=model", "data.path=data.jsonl", "data.sequence_length=64", "cluster=torchrun"]
    assert main([*command, "cluster.nodes=2", "cluster.rdzv_endpoint=127.0.0.2:29500", *settings]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_other_settings_than_the_runs_are_named(tmp_path: Path):
    fake_run(tmp_path / "run", "success")
    run = settings_by_name(load_config(tmp_path / "run"))
    check_same_settings(run, run, tmp_path / "run")
    these = run | {"optim.lr": 1e-3, "name": "other"}
    with pytest.raises(UserError, match=r"name=other here, name=distlora in the run; optim\.lr=0\.001 here, "):
        check_same_settings(these, run, tmp_path / "run")


def test_the_host_of_the_endpoint_is_found_by_its_address(monkeypatch: pytest.MonkeyPatch):
    try:
        here = rendezvous.source_address("192.0.2.1", 9)  # Where this machine's way out leads from.
    except UserError:
        pytest.skip("this machine has no way out, and so no address but its loopback")
    at_home = rendezvous.make_rendezvous(f"{here}:29500", nodes=2, run_id="a", join_seconds=60)
    assert (at_home.is_host, at_home.address) == (True, here)
    away = rendezvous.make_rendezvous("192.0.2.1:29500", nodes=2, run_id="a", join_seconds=60)
    assert (away.is_host, away.address) == (False, here)
    assert away.environment().keys() == {"GLOO_SOCKET_IFNAME"}
    # Debian's own entry for a host: the store is here, and gloo must not take that address.
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "localhost")
    own_name = rendezvous.make_rendezvous("localhost:29500", nodes=2, run_id="a", join_seconds=60)
    assert (own_name.is_host, own_name.address) == (True, "localhost")
    assert own_name.environment() == away.environment()
    monkeypatch.setenv(rendezvous.LOCAL_ADDRESS, "10.1.2.3")
    assert rendezvous.make_rendezvous("192.0.2.1:29500", nodes=2, run_id="a", join_seconds=60).address == "10.1.2.3"
    unreachable = dataclasses.replace(away, endpoint="127.0.0.3:9", join_seconds=0)
    assert "refused" in str(rendezvous.connection_error(unreachable))


def words(folders: Path, run_dir: Path, **settings: object) -> list[str]:
    """Return a command line that trains a small model for eight steps, each of them saved."""
    values = {
        "model.path": folders / "llama",
        "data.path": folders / "text.jsonl",
        "data.sequence_length": 64,
        "data.cache_dir": run_dir.parent / "cache",
        "train.max_steps": 8,
        "train.save_every": 1,
        "train.log_every": 1,
        "train.dtype": "fp32",
        "tracker": "none",
        "cluster": "torchrun",
        "run_dir": run_dir,
    }
    return ["train", *(f"{name}={value}" for name, value in (values | settings).items())]


def two_machines(port: int) -> dict[str, object]:
    return {"cluster.nodes": 2, "cluster.rdzv_endpoint": f"127.0.0.2:{port}", "cluster.timeout_seconds": 120}


def last_step(run_dir: Path) -> int:
    saved = sorted((run_dir / "checkpoints").glob("step_*"))
    return int(saved[-1].name.removeprefix("step_")) if saved else 0


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp2", "hsdp"])
def test_one_command_on_two_machines_is_one_run(parallel: str, folders: Path, tmp_path: Path, machines: list[Machine]):
    """Two nodes give the bits of as many ranks on one node; other settings are refused by name."""
    processes = 2 if parallel == "hsdp" else 1
    whole = words(folders, tmp_path / "one", **{"cluster.gpus_per_node": 2 * processes})
    alone = Machine(DISTLORA + whole, tmp_path / "alone")
    machines.append(alone)
    assert alone.wait() == 0, alone.says()
    settings = two_machines(free_port()) | {"cluster.gpus_per_node": processes, "parallel": parallel}
    command = DISTLORA + words(folders, tmp_path / "two", **settings)
    machines += [Machine(command, tmp_path / f"machine_{number}") for number in range(2)]
    wait_until(lambda: (tmp_path / "two" / "config.yaml").exists())
    odd = Machine([*command, "optim.lr=1e-3"], tmp_path / "odd")
    assert odd.wait() == 2
    assert "optim.lr=0.001 here, optim.lr=0.0002 in the run" in odd.says()
    assert [machine.wait() for machine in machines[1:]] == [0, 0], [machine.says() for machine in machines]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert sum("preparing the data" in machine.says() for machine in machines[1:]) == 1
    copies = "2 replicas of the base, each sharded over 2 ranks"
    assert sum(copies in machine.says() for machine in machines[1:]) == (parallel == "hsdp")
    again = Machine(command, tmp_path / "again")
    assert again.wait() == 2
    assert "already holds a run; continue it with `distlora resume" in again.says()


@pytest.mark.slow
def test_a_killed_worker_and_a_lost_machine_lose_nothing(folders: Path, tmp_path: Path, machines: list[Machine]):
    settings = {"train.max_steps": 60}
    whole = Machine(
        DISTLORA + words(folders, tmp_path / "whole", **settings, **{"cluster.gpus_per_node": 2}), tmp_path / "alone"
    )
    machines.append(whole)
    assert whole.wait() == 0, whole.says()
    run_dir, port = tmp_path / "run", free_port()
    command = DISTLORA + words(folders, run_dir, **settings, **two_machines(port))
    host = Machine(command, tmp_path / "host")
    machines.append(host)
    wait_until(lambda: listens(port))
    other = Machine(command, tmp_path / "other")
    machines.append(other)
    wait_until(lambda: last_step(run_dir) >= 2)
    other.workers()[0].kill()
    wait_until(lambda: "restart 1 of 3" in other.says())
    step = last_step(run_dir)
    wait_until(lambda: last_step(run_dir) > step + 1)
    other.process.kill()
    wait_until(lambda: "restart " in host.says())
    back = Machine([*DISTLORA, "resume", str(run_dir)], tmp_path / "back")
    machines.append(back)
    assert (host.wait(), back.wait()) == (0, 0), (host.says(), back.says())
    assert_same_run(run_dir, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        ("rank 1 exits with 3", 1, "gave up: rank 1 failed first: it exited with code 3\n"),
        ("bad input", 2, "error: the adapter has no such thing; write another\n"),
    ],
)
def test_a_machine_that_gives_up_ends_the_others(
    behaviour: str, code: int, message: str, tmp_path: Path, machines: list[Machine]
):
    """Rank 0 of the first sleeps for a minute, and would then wait for the other for five."""
    fake_run(tmp_path / "run", behaviour, max_restarts=1)
    machines += [part(tmp_path / "run", tmp_path / f"machine_{number}") for number in range(2)]
    assert [machine.wait(50) for machine in machines] == [code, code]
    said = [machine.says() for machine in machines]
    assert any(message in text for text in said)
    assert "Traceback" not in "".join(said)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.2", port)) == 0
