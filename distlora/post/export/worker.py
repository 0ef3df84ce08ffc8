"""Run the worker of `distlora export`: write, load with the real client in another process, then rename.

Figures and the place go to stdout, progress to stderr.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import UserError
from distlora.loading.tensor_files import new_folder
from distlora.post.export.formats import FORMATS, ClientReading, Export, ExportRequest
from distlora.post.load_trained import weights_in
from distlora.post.trained import Trained, versions
from distlora.system import atomic_io
from distlora.system.atomic_io import sha256
from distlora.system.command_worker import encode_call
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED
from distlora.system.progress import ProgressLines, say, still
from distlora.weights.peft_folder import WEIGHTS_NAME


def run(request: ExportRequest) -> int:
    """Write, check and publish an export; return the exit code."""
    out, began = Path(request.out), time.monotonic()
    trained = request.name.read()
    module: Any = importlib.import_module(FORMATS[request.format].module)
    try:
        with new_folder(out, inside=True) as place:
            module.write(Export(request=request, trained=trained, place=place, say=say, progress=ProgressLines()))
            size = sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())
            say(f"written in {time.monotonic() - began:.1f} s, {size / 1e6:,.1f} MB")
            has_client = bool(FORMATS[request.format].clients)
            checks = checked(request, place) if has_client and not request.no_check else None
            if checks is None and has_client:
                record_says = "; export.json records no check" if place.is_dir() else ""
                say(f"warning: nothing has compared it with the trained model{record_says}")
            if place.is_dir():
                atomic_io.write_json(place / "export.json", record(request, trained, checks))
    except Differs as error:
        say(f"{error}; nothing is left at {out}; --no-check writes it all the same")
        return FAILED
    print(f"wrote {out}")
    return DONE


class Differs(Exception):
    """Raised if the tool computes other outputs or fails."""


def record(request: ExportRequest, trained: Trained, checks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return export.json: sources, versions and the client's readings."""
    packages = ("distlora", "torch", "transformers", *FORMATS[request.format].clients)
    assert trained.weights is not None
    adapter, base = weights_in(trained.weights), trained.base
    return {
        "format": request.format,
        "from": Path(request.name.place).name,
        "adapter": {"folder": adapter.name, "sha256": sha256(adapter / WEIGHTS_NAME)},
        "base": {"name": trained.spec.model.name or base.name, "fingerprint": CheckpointFiles(base).fingerprint},
        "onto": request.onto if FORMATS[request.format].merged else None,
        "dtype": request.dtype,
        "for_version": request.version,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "versions": versions(*packages),
        "check": checks,
    }


def checked(request: ExportRequest, place: Path) -> dict[str, Any] | None:
    """Run and print the client's check; return None if it cannot load this layout. Raises Differs."""
    say("loading it with its client")
    with still("checking"):
        code, stdout = in_own_process(dataclasses.replace(request, place=str(place)))
    if code == BAD_INPUT:
        raise UserError("the export could not be checked, for the reason above; --no-check skips the check")
    if code < 0:
        raise Differs(f"the client was killed by signal {-code} (is memory short? `distlora export --help`)")
    if code != DONE:
        raise Differs(f"the client could not load it (exit code {code})")
    checks: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    readings = [ClientReading(**reading) for reading in checks["readings"]]
    if not readings:
        return None
    print("\n".join(table(readings, request, checks["moved"], checks["tokens"])))
    if not all(reading.within for reading in readings):
        raise Differs("the tool computes other outputs")
    return checks


def in_own_process(request: ExportRequest) -> tuple[int, str]:
    """Return (exit code, stdout) of the check's process."""
    call = encode_call("distlora.post.export.client_check:main", request)
    command = [sys.executable, "-m", "distlora.system.command_worker", call]
    quiet = os.environ | {"TQDM_DISABLE": "1"}  # transformers' bar of a GGUF file has no other switch.
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=quiet)
    return child.returncode, child.stdout


def table(readings: list[ClientReading], request: ExportRequest, moved: float | None, tokens: int) -> list[str]:
    """Return the lines of readings for the terminal."""
    ours = "the model as it was trained" if request.onto == "trained" else "the base on disk with the adapter"
    lines = [f"logits of {tokens} tokens compared with those of {ours}, in fp32:"]
    for reading in readings:
        bound = ""
        if reading.bound is not None:
            bound = f" (bound {reading.bound:.1e}: {'met' if reading.within else 'NOT MET'})"
        line = f"  {reading.what}: at most {reading.difference:.1e} apart{bound}"
        if reading.kl is not None and reading.same_top is not None:
            line += f", KL {reading.kl:.1e} nats per token, {reading.same_top:.0%} the same likeliest token"
        lines.append(line)
    if moved is not None:
        lines.append(f"  (the adapter itself moves them by up to {moved:.2g})")
    return lines
