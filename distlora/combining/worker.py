"""The worker of `distlora combine`: reads the adapters a weight at a time and writes one in PEFT's format."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora import durable
from distlora.checkpoints.files import appearing, write_files
from distlora.checkpoints.folder import sha256
from distlora.combining.checks import needs_base
from distlora.combining.methods import Combined, Part, combine
from distlora.combining.request import RECORD_NAME, Request
from distlora.combining.whole import Weighted, combined_modules, combined_rows, new_token_owner, row_ids
from distlora.command_line import DONE, request_text, run_to_exit_code
from distlora.deltas.base import Base, open_base
from distlora.deltas.factors import AdapterFile, Factors
from distlora.expert_targets import peft_paths
from distlora.initial_adapter import CONFIG_NAME, NF4_MARK, WEIGHTS_NAME
from distlora.json_files import read_object
from distlora.loading.reader import Reader
from distlora.loading.segments import read_header
from distlora.merging.kept import DTYPES
from distlora.merging.merge import merge_to
from distlora.parallel import Backend, Ranks, Shards
from distlora.saying import Progress, quieten
from distlora.tables import Table
from distlora.targets import match_ending
from distlora.tensor_files import Unmade
from distlora.tokens import EMBEDDING
from distlora.trained import Name, base_alone

_SINGLE = Ranks(0, 1, torch.device("cpu"), None)


class Combination:
    """The weights of the result, made one after the other as the file is written."""

    def __init__(self, request: Request, reader: Reader, say: Callable[[str], None]) -> None:
        self.request, self.reader, self.say = request, reader, say
        self.members = [
            Weighted(member.place, member.weight, AdapterFile.open(Path(member.folder)), header_of(member.folder))
            for member in request.members
        ]
        files = [member.file for member in self.members]
        self.base: Base | None = None
        if needs_base([file.read for file in files]):
            assert request.base_folder is not None
            self.base = open_base(base_alone(request.base_folder, request.quant, run_dir=request.out))
        self.paths = sorted({path for file in files for path in file.paths})
        self.fused = {
            path for file in files for path in match_ending(file.settings.target_parameters, list(file.paths))
        }
        self.ranks = {path: self._rank(path) for path in self.paths}
        self.energy: dict[str, tuple[float, float]] = {}
        """By path: ||dW||^2 and what of it the rank dropped, of what was truncated."""
        self._made: dict[str, tuple[Tensor, Tensor]] = {}
        self._done = 0

    def tensors(self) -> dict[str, Tensor | Unmade]:
        """By PEFT's names."""
        places = peft_paths(self.fused)
        found: dict[str, Tensor | Unmade] = {}
        for path in self.paths:
            shapes = self._shapes(path)
            for part, shape in zip("AB", shapes, strict=True):
                name = f"base_model.model.{places.get(path, path)}.lora_{part}.weight"
                make = functools.partial(self._make, path, part)
                found[name] = Unmade(shape=torch.Size(shape), dtype=torch.float32, make=make)
        if self.base is not None:
            found |= combined_rows(self.members, self.base, self.reader)
            found |= combined_modules(self.members, self.base, self.reader)
        return found

    def config(self) -> dict[str, Any]:
        """adapter_config.json: the first member's, with what is the result's own. The scale is 1 everywhere."""
        first = read_object(self.members[0].file.read.folder / CONFIG_NAME, "save the adapter again")
        ranks = list(self.ranks.values())
        most = max(set(ranks), key=ranks.count)
        others = {path: rank for path, rank in self.ranks.items() if rank != most}
        rows = row_ids(self.members)
        modules = sorted({name for member in self.members for name in member.file.modules})
        return (
            first
            | {
                "r": most,
                "lora_alpha": most,
                "use_rslora": False,
                "use_dora": False,
                "rank_pattern": others,
                "alpha_pattern": others,
                "lora_dropout": 0.0,
                "init_lora_weights": True,
                "inference_mode": True,
                "target_modules": self._targets(),
                "trainable_token_indices": rows[EMBEDDING] if rows.keys() == {EMBEDDING} else (rows or None),
                "modules_to_save": modules or None,
            }
            | ({"target_parameters": self._parameters()} if self.fused else {})
        )

    def _targets(self) -> list[str]:
        """The members' names together: what each one's list means it adapts. A pattern is written out as its paths."""
        found: set[str] = set()
        for member in self.members:
            entries = member.file.settings.target_modules
            linears = [path for path in member.file.paths if path not in self.fused]
            found.update(linears if isinstance(entries, str) else entries)
        return sorted(found)

    def _parameters(self) -> list[str]:
        return sorted({entry for member in self.members for entry in member.file.settings.target_parameters})

    def _parts(self, path: str) -> list[tuple[Weighted, int, int | None]]:
        """(member, rank, experts) of those that adapt a weight; experts where it is fused."""
        found = []
        for member in self.members:
            if path in member.file.paths:
                rank = member.file.settings.rank_of(path)
                rows = member.file.read.tensors[path, "A"].shape[0]
                found.append((member, rank, rows // rank if path in self.fused else None))
        return found

    def _sizes(self, path: str) -> tuple[int, int]:
        """(out, in) of a weight, or of each expert's."""
        tensors = self._parts(path)[0][0].file.read.tensors
        return tensors[path, "B"].shape[0], tensors[path, "A"].shape[1]

    def _rank(self, path: str) -> int:
        ranks = [rank for _, rank, _ in self._parts(path)]
        if self.request.how.on == "sum":
            return sum(ranks)
        if self.request.how.on == "factors":
            return ranks[0]
        dense = self.request.method != "svd" or any(m.file.read.settings["use_dora"] for m, _, _ in self._parts(path))
        most = self.request.rank or max(ranks)
        return min(most, *self._sizes(path), *([] if dense else [sum(ranks)]))

    def _shapes(self, path: str) -> tuple[tuple[int, int], tuple[int, int]]:
        out, into = self._sizes(path)
        rows = self.ranks[path] * (self._parts(path)[0][2] or 1)
        return (rows, into), (out, rows)

    def _make(self, path: str, part: str) -> Tensor:
        """A or B; the other waits for its turn, which is the next."""
        if path not in self._made:
            self._made[path] = self._combined(path)
        made = self._made[path]["AB".index(part)]
        if part == "B":
            del self._made[path]
            self._done += 1
            self.say(f"combining: {self._done:,}/{len(self.paths):,} weights, {path}")
        return made

    def _combined(self, path: str) -> tuple[Tensor, Tensor]:
        parts = self._parts(path)
        factors = [(member.weight, member.file.factors(path, self.reader, experts=count)) for member, _, count in parts]
        experts = parts[0][2]

        @functools.cache
        def weight() -> Tensor:
            assert self.base is not None
            return self.base.weights[f"{path}.weight"].whole(self.reader)

        if experts is None:
            made = combine([Part(w, f) for w, f in factors], self.request, path, weight)
            self._note(path, [made])
            return made.A, made.B
        each = []
        for expert in range(experts):
            own = [Part(w, Factors(A=f.A[expert], B=f.B[expert], scaling=f.scaling)) for w, f in factors]
            each.append(combine(own, self.request, f"{path}.{expert}", weight))
        self._note(path, each)
        a, b = torch.stack([made.A for made in each]), torch.stack([made.B for made in each])
        # PEFT's layout (deltas/factors.py): row e * R + j of A, column j * E + e of B.
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    def _note(self, path: str, made: Sequence[Combined]) -> None:
        if made[0].energy is not None:
            self.energy[path] = (sum(one.energy or 0.0 for one in made), sum(one.dropped for one in made))


def header_of(folder: str) -> Mapping[str, Any]:
    return read_header(Path(folder) / WEIGHTS_NAME)


def run(request: Request) -> dict[str, Any]:
    """Write the adapter, or the base with it; returns its record."""
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
        receipt = merge_to(trained, out, onto=request.onto, dtype=DTYPES[request.dtype], say=say)
    durable.write_json(out / RECORD_NAME, found)
    # The adapter is gone: what it was made of is in the record.
    made_of = {**(receipt.adapter or {}), "place": RECORD_NAME, "folder": RECORD_NAME}
    files = receipt.files | {RECORD_NAME: sha256(out / RECORD_NAME)}
    dataclasses.replace(receipt, adapter=made_of, files=files).write(out)
    return found


def write_adapter(request: Request, out: Path, say: Progress) -> dict[str, Any]:
    """The folder in PEFT's format, whole or not at all; returns its record."""
    backend = Backend(_SINGLE, Shards.over(_SINGLE, 1))
    with Reader() as reader:
        made = Combination(request, reader, say)
        say.line(f"combining {len(made.members)} adapters, {len(made.paths):,} weights, by {request.method}")
        for_nf4 = any(member.file.read.settings["init_from_loftq"] for member in made.members)
        with appearing(out) as folder:
            files = {CONFIG_NAME: made.config(), WEIGHTS_NAME: made.tensors()}
            write_files(folder, files, backend, metadata=NF4_MARK if for_nf4 else {})
            owner = None if made.base is None else new_token_owner(made.members, made.base)
            if owner is not None:
                copy_tokenizer(owner.file.read.folder, folder)
            found = record(request, made, folder)
            durable.write_json(folder / RECORD_NAME, found)
    return found


def copy_tokenizer(source: Path, folder: Path) -> None:
    """What an adapter with new tokens is published with, beside its weights."""
    for path in source.iterdir():
        if path.is_file() and path.name not in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME, "README.md"):
            shutil.copy2(path, folder / path.name)


def record(request: Request, made: Combination, folder: Path) -> dict[str, Any]:
    """combine.json."""
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
    """||what was dropped|| / ||dW||."""
    return math.sqrt(dropped / energy) if energy > 0 else 0.0


def told(request: Request, found: Mapping[str, Any]) -> str:
    """The result, for the terminal."""
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


def main(argument: str) -> int:
    """Combine; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    quieten()

    def work() -> int:
        request = Request.read(request_text(argument))
        found = run(request)
        print(told(request, found))
        what = "an adapter in PEFT's format" if request.onto is None else f"the merged model in {request.dtype}"
        print(f"wrote {request.out}: {what}, and {RECORD_NAME}")
        return DONE

    return run_to_exit_code(work)
