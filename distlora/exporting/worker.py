"""The worker of `distlora export`: writes, has the real client load it in a process of its own, then gives it its name.

What is on stdout are the figures and the place; progress goes to stderr.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora import durable
from distlora.checkpoints.files import publish
from distlora.checkpoints.folder import temporary_of
from distlora.command_line import BAD_INPUT, DONE, FAILED, run_to_exit_code
from distlora.config import UserError
from distlora.exporting.formats import FORMATS
from distlora.exporting.request import Export, Reading, Request
from distlora.saying import Progress, quieten, say, still_loading

CHECK = "distlora.exporting.check"
RECORD_NAME = "export.json"
"""In an exported folder."""


def run(request: Request) -> int:
    """Write, check, publish; returns the exit code."""
    out = Path(request.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = temporary_of(out)
    _remove(place)
    began = time.monotonic()
    try:
        export = Export(request=request, trained=request.name.read(), place=place, say=say, progress=Progress())
        module: Any = importlib.import_module(FORMATS[request.format].module)
        module.write(export)
        say(f"written in {time.monotonic() - began:.1f} s, {_size(place) / 1e6:,.1f} MB")
        found: dict[str, Any] | None = None
        if request.check:
            found = checked(request, place)
            if found is None or not all(reading.within for reading in found["readings"]):
                say(f"nothing is left at {out}; --no-check writes it all the same")
                return FAILED
        else:
            say("not loaded by a client: --no-check")
        if place.is_dir():
            durable.write_json(place / RECORD_NAME, record(request, found))
        _publish(place, out)
    finally:
        _remove(place)
    print(f"wrote {out}")
    return DONE


def record(request: Request, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """What stands in the folder: made from what, with which packages, and what its client computed."""
    packages = ("distlora", "torch", "transformers", *FORMATS[request.format].clients)
    return {
        "format": request.format,
        "from": Path(request.name.place).name,
        "dtype": request.dtype,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "versions": {name: importlib.metadata.version(name) for name in dict.fromkeys(packages)},
        "check": None
        if found is None
        else {**found, "readings": [dataclasses.asdict(reading) for reading in found["readings"]]},
    }


def checked(request: Request, place: Path) -> dict[str, Any] | None:
    """What the format's client computes, in a process of its own; printed, too. None where it could not load it."""
    say("loading it with its client")
    argument = dataclasses.replace(request, place=str(place)).as_json()
    with still_loading():
        child = subprocess.run([sys.executable, "-m", CHECK, argument], stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode == BAD_INPUT:
        raise UserError("the export could not be checked; the line above says why")
    if child.returncode != DONE:
        say(f"the client could not load it: exit code {child.returncode}")
        return None
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    found["readings"] = [Reading(**reading) for reading in found["readings"]]
    print("\n".join(table(found["readings"], found["moved"], found["tokens"])))
    return found


def table(readings: list[Reading], moved: float | None, tokens: int) -> list[str]:
    """What the user is told."""
    lines = [f"logits of {tokens} tokens beside those of the model as it was trained, in fp32:"]
    for reading in readings:
        bound = ""
        if reading.bound is not None:
            bound = f" (bound {reading.bound:.1e}: {'met' if reading.within else 'NOT MET'})"
        line = f"  {reading.what}: at most {reading.difference:.1e} apart{bound}"
        if reading.kl is not None and reading.same_top is not None:
            line += f", KL {reading.kl:.1e} nats a token, {reading.same_top:.0%} the same likeliest token"
        lines.append(line)
    if moved is not None:
        lines.append(f"  (the adapter itself moves them by up to {moved:.2g})")
    return lines


def _publish(place: Path, out: Path) -> None:
    if place.is_dir():
        publish(place, out)
        return
    durable.sync(place)
    place.rename(out)
    durable.sync(out.parent)


def _remove(place: Path) -> None:
    """What an export that was killed has left, or one that is not to be."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())


def main(argument: str) -> int:
    """Export; returns the exit code: 0, 1 where the client found something else, 2 for bad input."""
    quieten()
    return run_to_exit_code(lambda: run(Request.read(argument)))
