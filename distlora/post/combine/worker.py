"""Run the worker of `distlora combine`: read adapters one weight at a time, write one in PEFT's format."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distlora.checkpoint.files import new_folder, write_files
from distlora.output.tables import Table
from distlora.parallel import Backend, Ranks, Shards
from distlora.post.combine.combination import Combination
from distlora.post.combine.request import RECORD_NAME, CombineRequest
from distlora.post.combine.whole_modules import new_token_owner
from distlora.post.merge.merge import merge_to
from distlora.post.merge.rounding_loss import DTYPES
from distlora.post.trained import Name
from distlora.run_folder.checkpoint_manifest import sha256
from distlora.system import atomic_io
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress import Progress, quieten
from distlora.weights.peft_folder import CONFIG_NAME, NF4_MARK, WEIGHTS_NAME
from distlora.weights.reader import Reader

_SINGLE = Ranks(0, 1, torch.device("cpu"), None)


def run(request: CombineRequest) -> dict[str, Any]:
    """Write the adapter, or the base merged with it; return its record."""
    say = Progress()
    out = Path(request.out)
    if request.onto is None:
        return write_adapter(request, out, say)
    assert request.base_folder is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".distlora-combine-", dir=out.parent) as scratch:
        folder = Path(scratch) / "adapter"
        found = write_adapter(request, folder, say)
        trained = Name(place=str(folder), base=request.base_folder, quant=request.quant).read()
        trained = dataclasses.replace(trained, spec=dataclasses.replace(trained.spec, dtype=request.held))
        receipt = merge_to(trained, out, onto=request.onto, dtype=DTYPES[request.dtype], say=say)
    atomic_io.write_json(out / RECORD_NAME, found)
    # The adapter was temporary: combine.json says what it was made of.
    made_of = {**(receipt.adapter or {}), "place": RECORD_NAME, "folder": RECORD_NAME}
    files = receipt.files | {RECORD_NAME: sha256(out / RECORD_NAME)}
    dataclasses.replace(receipt, adapter=made_of, files=files).write(out)
    return found


def write_adapter(request: CombineRequest, out: Path, say: Progress) -> dict[str, Any]:
    """Write the folder in PEFT's format, completely or not at all; return its record."""
    backend = Backend(_SINGLE, Shards.over(_SINGLE, 1))
    with Reader() as reader:
        made = Combination(request, reader, say)
        say.line(f"combining {len(made.members)} adapters, {len(made.paths):,} weights, by {request.method}")
        for_nf4 = any(member.file.read.settings["init_from_loftq"] for member in made.members)
        with new_folder(out) as folder:
            files = {CONFIG_NAME: made.config(), WEIGHTS_NAME: made.tensors()}
            write_files(folder, files, backend, metadata=NF4_MARK if for_nf4 else {})
            owner = None if made.base is None else new_token_owner(made.members, made.base)
            if owner is not None:
                copy_tokenizer(owner.file.read.folder, folder)
            found = record(request, made, folder)
            atomic_io.write_json(folder / RECORD_NAME, found)
    return found


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer that an adapter with new tokens is published with."""
    for path in source.iterdir():
        if path.is_file() and path.name not in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME, "README.md"):
            shutil.copy2(path, folder / path.name)


def main(request: CombineRequest) -> int:
    """Combine adapters; return the exit code."""
    quieten()

    def work() -> int:
        found = run(request)
        print(told(request, found))
        what = "an adapter in PEFT's format" if request.onto is None else f"the merged model in {request.dtype}"
        print(f"wrote {request.out}: {what}, and {RECORD_NAME}")
        return DONE

    return run_to_exit_code(work)


def record(request: CombineRequest, made: Combination, folder: Path) -> dict[str, Any]:
    """Return combine.json."""
    energy, dropped = (sum(values) for values in zip(*made.energy.values(), strict=True)) if made.energy else (0.0, 0.0)
    worst = max(made.energy, key=lambda path: _share(*made.energy[path]), default=None)
    return {
        "command": request.command,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "version": importlib.metadata.version("distlora"),
        "method": request.method,
        "rank": request.rank,
        "density": request.density,
        "majority_sign_method": request.majority_sign_method if request.how.elects else None,
        "seed": request.seed if request.how.draws else None,
        "base_fingerprint": next((member.base for member in request.members if member.base), None),
        "members": [
            {
                "place": member.place,
                "weight": member.weight,
                "quant": member.quant,
                "sha256": sha256(Path(member.folder) / WEIGHTS_NAME),
            }
            for member in request.members
        ],
        "sha256": sha256(folder / WEIGHTS_NAME),
        "weights": len(made.paths),
        "ranks": {"smallest": min(made.ranks.values()), "largest": max(made.ranks.values())},
        "truncation": None
        if worst is None
        else {
            # Frobenius norms over all weights, and of the weight that lost the largest share.
            "norm": math.sqrt(energy),
            "dropped": math.sqrt(dropped),
            "share": _share(energy, dropped),
            "worst": {"path": worst, "share": _share(*made.energy[worst])},
        },
    }


def _share(energy: float, dropped: float) -> float:
    """Return ||dropped part|| / ||dW||."""
    return math.sqrt(dropped / energy) if energy > 0 else 0.0


def told(request: CombineRequest, found: Mapping[str, Any]) -> str:
    """Return the result for the terminal."""
    rows = [("adapter", "weight", "base held in")]
    rows += [(m.place, f"{m.weight:g}", m.quant or "unknown") for m in request.members]
    ranks = found["ranks"]
    same = ranks["smallest"] == ranks["largest"]
    rank = f"rank {ranks['largest']}" if same else f"ranks {ranks['smallest']} to {ranks['largest']}"
    lines = [Table(f"{request.method}: {request.how.what}", rows).text(), f"\n{found['weights']} weights, {rank}"]
    if (lost := found["truncation"]) is not None:
        lines.append(
            f"the rank dropped {lost['share']:.2%} of ||dW|| = {lost['norm']:.4g} over all weights, at most "
            f"{lost['worst']['share']:.2%} of one ({lost['worst']['path']})"
        )
    return "\n".join(lines)
