"""Stand in for the part of wandb's server that `wandb sweep` and `wandb agent` speak to (wandb 0.31).

It takes grids, hands out their cells, and notes what agents do. Runs log offline beside it.

The operations are wandb's own, private protocol: with another version of wandb they may be others, and a test that
then fails says which.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support import loopback

ENTITY, PROJECT = "local", "project"


@dataclass
class Sweep:
    """A sweep that was registered."""

    name: str
    text: str
    """As it was sent."""
    todo: list[dict[str, Any]] = field(default_factory=list)
    handed_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Run id -> values."""
    by_agent: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class WandbServer:
    """Its sweeps, and what it could not answer."""

    url: str = ""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    stop_runs: set[str] = field(default_factory=set)
    """Runs whose agent is told to end them, as early termination does."""
    unknown: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for wandb's commands and for runs."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "k" * 40,
            "WANDB_ENTITY": ENTITY,
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "false",
        }

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return `data` of an operation."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name, low = named[1] if named else "?", query.lower()
        project = {"id": "P", "name": PROJECT, "entity": {"id": "E", "name": ENTITY}}
        if "upsertsweep" in low:
            sweep = self._take(variables["config"])
            return {"upsertSweep": {"sweep": {"id": "U", "name": sweep.name, "project": project}}}
        if "createagent" in low:
            sweep = self._sweep(variables)
            agent = f"{sweep.name}-agent{len(sweep.by_agent)}"
            sweep.by_agent[agent] = []
            return {"createAgent": {"agent": {"id": agent, "name": agent}}}
        if "agentheartbeat" in low:
            agent = self._value(variables, "id", "agentId")
            busy = json.loads(self._value(variables, "runState") or "{}")
            return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(self._commands(agent, busy))}}
        if "sweep(" in low:
            sweep = self._sweep(variables)
            return {"project": {**project, "sweep": self._described(sweep)}}
        if "viewer" in low:
            flags = {"admin": False, "flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}}
            viewer = {"id": "V", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "", **flags}
            return {"viewer": viewer, "serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "0.99.0"}}}
        if "serverinfo" in low:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}}}
        self.unknown.append(name)
        return {}

    def _take(self, text: str) -> Sweep:
        config = yaml.safe_load(text)
        parameters = config["parameters"]
        lists = [values["values"] if "values" in values else [values.get("value")] for values in parameters.values()]
        cells = [dict(zip(parameters, cell, strict=True)) for cell in itertools.product(*lists)]
        sweep = Sweep(name=f"sweep{len(self.sweeps)}", text=text, todo=cells)
        self.sweeps[sweep.name] = sweep
        return sweep

    def _commands(self, agent: str, busy: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the commands for an agent that has `busy` runs."""
        if busy:
            return [{"type": "stop", "run_id": run} for run in busy if run in self.stop_runs]
        sweep = self.sweeps[agent.partition("-")[0]]
        if not sweep.todo:
            return [{"type": "exit"}]
        values, run = sweep.todo.pop(0), f"{sweep.name}run{len(sweep.handed_out)}"
        sweep.handed_out[run] = values
        sweep.by_agent[agent].append(run)
        arguments = {name: {"value": value} for name, value in values.items()}
        return [{"type": "run", "run_id": run, "program": None, "args": arguments}]

    def _sweep(self, variables: dict[str, Any]) -> Sweep:
        return next(sweep for sweep in self.sweeps.values() if sweep.name in map(str, _leaves(variables)))

    @staticmethod
    def _value(variables: dict[str, Any], *names: str) -> Any:
        inner = variables.get("input", {})
        return next((place[name] for place in (variables, inner) for name in names if place.get(name)), None)

    @staticmethod
    def _described(sweep: Sweep) -> dict[str, Any]:
        nothing = ("heartbeatAt", "updatedAt", "controller", "scheduler")
        return {
            "id": "U",
            "name": sweep.name,
            "method": "grid",
            "state": "RUNNING",
            "description": "",
            "config": sweep.text,
            "createdAt": "2026-01-01T00:00:00",
            "earlyStopJobRunning": False,
            "runs": {"edges": []},
            **dict.fromkeys(nothing),
        }


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


@contextmanager
def running_wandb_server() -> Iterator[WandbServer]:
    """Serve on a free port of this machine, for the duration."""
    server, lock = WandbServer(), threading.Lock()

    class WandbHandler(loopback.Handler):
        def do_GET(self) -> None:
            self.answer(200, {})

        def do_POST(self) -> None:
            content = self.body()
            if self.path != "/graphql":  # wandb's telemetry.
                return self.answer(200, {})
            asked = json.loads(content)
            with lock:
                found = server.answer(asked.get("query", ""), asked.get("variables") or {})
            return self.answer(200, {"data": found})

    with loopback.serving(WandbHandler) as server.url:
        yield server


def read_wandb_log(folder: Path) -> list[Any]:
    """Return the records of an offline run.

    The file is a LevelDB log: 7-byte file header, 32 KiB blocks of crc, length, kind, payload.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data, position, record, records = path.read_bytes(), 7, b"", []
    while len(data) - position > 7:
        position += (32768 - position % 32768) * (32768 - position % 32768 < 7)  # A header never straddles two blocks.
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + chunk) == crc
        position += 7 + length
        record += chunk
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return records
