"""`distlora sweep agent`: real agents of wandb, which ask its server for values and start `distlora train` with them.

An agent is ended as a run is: by a request to stop, which it hands on to its run. What a run has saved by then is gone
on with when the same command is given again, before new ones are asked for.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora import durable
from distlora.command_line import DONE, FAILED, INTERRUPTED, STOPPED
from distlora.config import UserError, require
from distlora.json_files import object_or_empty, read_object
from distlora.run_folder import find_result
from distlora.stopping import STOPPED_NAME
from distlora.sweep_folder import words_of
from distlora.wandb_agent import VARIABLES, AgentRun
from distlora_launcher.arguments import Parser
from distlora_launcher.holding import holders, worker_place
from distlora_launcher.jobs.step import in_job
from distlora_launcher.logs import host_name
from distlora_launcher.output import say, shown
from distlora_launcher.signals import Forwarder, forwarding
from distlora_launcher.sweeps.wandb_trial import FOLDER, folder_of
from distlora_launcher.worker_entry import PARENT

USAGE = """usage: distlora sweep agent ENTITY/PROJECT/ID [--count N] [run_dir=FOLDER] [sweep.workers=N]
                            [cluster=slurm ...]

Start agents of wandb for the sweep that `distlora sweep create`, or `wandb sweep`, has registered: each asks for
values, trains with them, and asks again, until the sweep is done. Its runs' folders are FOLDER/<id of the run>, by
default runs/<ID>/<id of the run>. sweep.workers=N starts N agents, here with an equal share of the cards each, with
cluster=slurm as the tasks of an array, each with cluster.nodes machines.

A request to stop (Ctrl-C, SIGTERM, `distlora cancel FOLDER`) has the runs save. `distlora resume FOLDER`, or the same
command, goes on with them.

--count N    runs of each agent; by default all that the sweep has"""

RECORD_NAME = "agents.json"
"""In the folder: what was asked for."""

POLL_SECONDS = 0.2

DEFAULTS = {
    # A trial that fails is recorded as such and ends no sweep; by default three in the first minute end the agent.
    "WANDB_AGENT_DISABLE_FLAPPING": "true",
    "WANDB_AGENT_MAX_INITIAL_FAILURES": "1000000",
    # From the SIGTERM of wandb's early termination to its SIGKILL: a save may take longer than 30 s.
    "WANDB_AGENT_KILL_DELAY": "600",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What agents are started for."""

    sweep: str
    """[[ENTITY/]PROJECT/]ID"""
    folder: Path
    count: int | None
    workers: int
    cluster: tuple[str, ...]
    """Words about the cluster."""

    @property
    def sweep_id(self) -> str:
        return self.sweep.rpartition("/")[2]

    def one(self) -> list[str]:
        """The words of `distlora sweep agent` for one of them, beside its --index."""
        count = [] if self.count is None else ["--count", str(self.count)]
        return [self.sweep, *count, *words_of({"run_dir": str(self.folder)})]

    def words(self) -> list[str]:
        """The words for all of them."""
        return [*self.one(), f"sweep.workers={self.workers}", *self.cluster]

    def keep(self) -> None:
        """Note it, for `distlora resume`."""
        durable.write_json(self.folder / RECORD_NAME, {"words": self.words()})


def main(arguments: list[str]) -> int:
    """Start agents, and wait for them. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    request, index, cluster = ask(arguments)
    require(
        importlib.util.find_spec("wandb") is not None,
        "wandb is not installed, whose agents these are; `pip install wandb`",
    )
    if index is None and cluster.launcher == "slurm":
        submitted: int = importlib.import_module("distlora_launcher.sweeps.arrays").submit_agents(request, cluster)
        return submitted
    (request.folder / "logs").mkdir(parents=True, exist_ok=True)
    # Several commands may share a folder, on several machines, too; a task of an array has its number once.
    name = f"agents_{host_name()}_{os.getpid()}" if index is None else f"agent_{index}"
    with worker_place(request.folder, name), forwarding() as forwarder:
        if index is None:
            request.keep()
        return Agents(request, [index] if index is not None else range(request.workers), cluster).run(forwarder)


def is_agents_folder(folder: Path) -> bool:
    """Whether agents have, or had, their runs in a folder."""
    return (folder / RECORD_NAME).is_file()


def go_on(folder: Path) -> int:
    """Start the agents of a folder again (`distlora resume`). Returns the exit code."""
    words = read_object(folder / RECORD_NAME, f"delete it, and start the agents in run_dir={folder}").get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{folder / RECORD_NAME} is damaged: it holds no words; delete it, and start the agents again")
    return main(words)


def ask(arguments: Sequence[str]) -> tuple[Request, int | None, Any]:
    """What a command line asks for, the number of the one agent that a task of an array is, and the section cluster."""
    from distlora_launcher.compose import compose_section, parse_overrides

    parser = Parser("distlora sweep agent")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--count", type=int)
    parser.add_argument("--index", type=int)
    options = parser.parse_args(list(arguments))
    sweeps = [word for word in options.words if "=" not in word]
    require(
        len(sweeps) == 1 and re.fullmatch(r"([^/\s]+/){0,2}[\w-]+", sweeps[0]) is not None,
        f"{' '.join(sweeps) or 'no sweep'}: give one sweep, as `distlora sweep create` prints it: distlora sweep agent "
        "ENTITY/PROJECT/ID",
    )
    require(options.count is None or options.count > 0, f"--count {options.count} starts no run; write --count 10")
    words = [word for word in options.words if "=" in word]
    known = ("run_dir", "sweep.workers", "cluster")
    for word in words:
        name = word.partition("=")[0]
        require(
            name in known or name.startswith("cluster."),
            f"{word}: the settings of its runs are in the sweep; an agent takes run_dir=, sweep.workers= and cluster=",
        )
    values = {o.get_key_element(): o.value() for o in parse_overrides(words)}
    workers = values.get("sweep.workers", 1)
    if not isinstance(workers, int) or workers < 1:
        raise UserError(f"sweep.workers={workers} is no number of agents; set sweep.workers=2")
    of_cluster = [word for word in words if word.startswith("cluster")]
    cluster = compose_cluster(compose_section("cluster", of_cluster))
    folder = Path(str(values.get("run_dir", folder_of(sweeps[0].rpartition("/")[2])))).expanduser().absolute()
    request = Request(sweep=sweeps[0], folder=folder, count=options.count, workers=workers, cluster=tuple(of_cluster))
    return request, options.index, cluster


def compose_cluster(values: dict[str, Any]) -> Any:
    """The section cluster."""
    from distlora.config import ClusterConfig
    from distlora.config_file import build

    return build(ClusterConfig, values, prefix="cluster.")


class Agents:
    """The agents of one command on this machine."""

    def __init__(self, request: Request, indices: Sequence[int], cluster: Any) -> None:
        from distlora_launcher.sweeps.local import shares

        self._request, self._indices = request, indices
        # A task of an array has its cards from SLURM.
        own = len(indices) == 1
        self._cards = [None] if own else shares(len(indices), cluster.gpus_per_node)
        self._asked_at: float | None = None

    def run(self, forwarder: Forwarder) -> int:
        """To the end of all of them. Returns the exit code."""
        self._go_on(forwarder)
        if forwarder.received is not None:
            return STOPPED
        processes = [self._start(index, cards) for index, cards in zip(self._indices, self._cards, strict=True)]
        forwarder.attach(processes[0], lambda _: None)
        while any(process.poll() is None for process in processes):
            if forwarder.received is not None and self._asked_at is None:
                self._asked_at = time.time()
                for process in processes:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)
            if forwarder.killed:
                for process in processes:
                    process.kill()
            time.sleep(POLL_SECONDS)
        forwarder.detach()
        if self._asked_at is not None:
            self._note_saved()
            if not in_job():  # There the script queues the task again.
                say(f"asked to stop; go on with: distlora resume {shown(self._request.folder)}")
            return INTERRUPTED if forwarder.killed else STOPPED
        return DONE if all(process.returncode == 0 for process in processes) else FAILED

    def _start(self, index: int, cards: str | None) -> subprocess.Popen[bytes]:
        request = self._request
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        environment |= {FOLDER: str(request.folder), PARENT: str(os.getpid()), "PYTHONSAFEPATH": "1"}
        environment = {**DEFAULTS, "WANDB_DIR": str(request.folder), **environment}
        # The sweep's command says `distlora`: this one.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        if cards is not None:
            environment["CUDA_VISIBLE_DEVICES"] = cards
        count = [] if request.count is None else ["--count", str(request.count)]
        command = [sys.executable, "-m", "distlora_launcher.bound", "wandb"]
        command += ["agent", "--forward-signals", *count, request.sweep]
        if len(self._indices) == 1:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        log = request.folder / "logs" / f"agent_{index}.log"
        say(f"agent {index}: {shown(log)}")
        with log.open("ab") as file:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def _go_on(self, forwarder: Forwarder) -> None:
        """Go on with what the agents of these numbers have saved when they were asked to stop."""
        for index in self._indices:
            record = self._record(index)
            for name in object_or_empty(record).get("saved", []):
                run = self._request.folder / str(name)
                if forwarder.received is not None:
                    return  # The record stays.
                if find_result(run) is None and not holders(run):
                    say(f"{shown(run)} goes on")
                    command = [sys.executable, "-m", "distlora_launcher.bound", "distlora_launcher.cli", "resume"]
                    process = subprocess.Popen(
                        [*command, str(run)],
                        env=os.environ | {"PYTHONSAFEPATH": "1", PARENT: str(os.getpid())},
                        start_new_session=True,
                    )
                    forwarder.attach(process)
                    process.wait()
                    forwarder.detach()
            if forwarder.received is None:
                record.unlink(missing_ok=True)

    def _note_saved(self) -> None:
        """Leave the names of the runs that have stopped since they were asked to; those that wandb itself has ended
        early are not among them."""
        assert self._asked_at is not None
        saved = []
        for marker in sorted(self._request.folder.glob(f"*/{STOPPED_NAME}")):
            run = marker.parent
            of_sweep = AgentRun.of_run(run)
            if of_sweep is not None and of_sweep.sweep_id == self._request.sweep_id and find_result(run) is None:
                saved += [run.name] if marker.stat().st_mtime >= self._asked_at - 1 else []
        durable.write_json(self._record(self._indices[0]), {"saved": saved})

    def _record(self, index: int) -> Path:
        return self._request.folder / "logs" / f"agent_{index}.json"
