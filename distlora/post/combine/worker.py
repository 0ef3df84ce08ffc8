"""Run the worker of `distlora combine`: read adapters one weight at a time, write one in PEFT's format."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora import __version__
from distlora.architecture.targets import match_ending, peft_paths
from distlora.architecture.tokens import EMBEDDING
from distlora.checkpoint.files import new_folder, write_files
from distlora.config.json_files import read_object
from distlora.loading.tensor_files import DeferredTensor
from distlora.output.results import Table
from distlora.parallel import Backend, Ranks, Shards
from distlora.post.combine.methods import Weighted, combine, combined_modules, combined_rows, new_token_owner, row_ids
from distlora.post.combine.request import RECORD_NAME, CombineRequest, needs_base
from distlora.post.merge.merge import DTYPES, merge_to
from distlora.post.trained import Name, base_spec
from distlora.post.weights import Base, Factors, open_base, read_factors
from distlora.system import atomic_io
from distlora.system.atomic_io import sha256
from distlora.system.exit_codes import DONE, run_to_exit_code
from distlora.system.progress import Progress, quieten
from distlora.weights.peft_folder import CONFIG_NAME, NF4_MARK, WEIGHTS_NAME, read_peft_adapter
from distlora.weights.reader import Reader


class Combination:
    """The weights of the result, computed one at a time as the file is written."""

    def __init__(self, request: CombineRequest, reader: Reader, say: Callable[[str], None]) -> None:
        self.request, self.reader, self.say = request, reader, say
        self.members = [Weighted(m.place, m.weight, read_peft_adapter(m.folder)) for m in request.members]
        files = [member.file for member in self.members]
        self.base: Base | None = None
        if needs_base(files):
            assert request.base_folder is not None
            self.base = open_base(base_spec(request.base_folder, request.quant, dtype=request.held))
        self.paths = sorted({path for file in files for path in file.paths})
        self.parameters = sorted({entry for file in files for entry in file.adapter_config.target_parameters})
        self.fused = {
            path for file in files for path in match_ending(file.adapter_config.target_parameters, file.paths)
        }
        self.ranks = {path: self._rank(path) for path in self.paths}
        self.energy: dict[str, tuple[float, float]] = {}
        """||dW||^2 and the part of it that the rank dropped, by path of a truncated weight."""
        self._made: dict[str, tuple[Tensor, Tensor]] = {}
        self._done = 0

    def tensors(self) -> dict[str, Tensor | DeferredTensor]:
        """Return the tensors by PEFT's names."""
        places = peft_paths(self.fused)
        found: dict[str, Tensor | DeferredTensor] = {}
        for path in self.paths:
            out, into = self._sizes(path)
            rows = self.ranks[path] * (self._parts(path)[0][2] or 1)
            for part, shape in zip("AB", ((rows, into), (out, rows)), strict=True):
                name = f"base_model.model.{places.get(path, path)}.lora_{part}.weight"
                make = functools.partial(self._make, path, part)
                found[name] = DeferredTensor(shape=torch.Size(shape), dtype=torch.float32, make=make)
        if self.base is not None:
            found |= combined_rows(self.members, self.base, self.reader)
            found |= combined_modules(self.members, self.base, self.reader)
        return found

    def config(self) -> dict[str, Any]:
        """Return adapter_config.json: the first member's with the result's ranks, targets and scale 1."""
        first = read_object(self.members[0].file.folder / CONFIG_NAME, "save the adapter again")
        ranks = list(self.ranks.values())
        most = max(set(ranks), key=ranks.count)
        others = {path: rank for path, rank in self.ranks.items() if rank != most}
        rows = row_ids(self.members)
        targets: set[str] = set()
        for member in self.members:
            entries = member.file.adapter_config.target_modules
            # A pattern is expanded to its paths.
            targets.update(set(member.file.paths) - self.fused if isinstance(entries, str) else entries)
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
                "target_modules": sorted(targets),
                "trainable_token_indices": rows[EMBEDDING] if rows.keys() == {EMBEDDING} else (rows or None),
                "modules_to_save": sorted({name for member in self.members for name in member.file.modules}) or None,
            }
            | ({"target_parameters": self.parameters} if self.fused else {})
        )

    def _parts(self, path: str) -> list[tuple[Weighted, int, int | None]]:
        """Return (member, rank, experts) of the members that adapt a weight; experts is None unless fused."""
        found = []
        for member in self.members:
            if path in member.file.paths:
                rank = member.file.adapter_config.rank_of(path)
                rows = member.file.tensors[path, "A"].shape[0]
                found.append((member, rank, rows // rank if path in self.fused else None))
        return found

    def _sizes(self, path: str) -> tuple[int, int]:
        """Return (out, in) of a weight, or of each expert's."""
        tensors = self._parts(path)[0][0].file.tensors
        return tensors[path, "B"].shape[0], tensors[path, "A"].shape[1]

    def _rank(self, path: str) -> int:
        ranks = [rank for _, rank, _ in self._parts(path)]
        if self.request.how.on == "sum":
            return sum(ranks)
        if self.request.how.on == "factors":
            return ranks[0]
        dense = self.request.method != "svd" or any(m.file.settings["use_dora"] for m, _, _ in self._parts(path))
        most = self.request.rank or max(ranks)
        return min(most, *self._sizes(path), *([] if dense else [sum(ranks)]))

    def _make(self, path: str, part: str) -> Tensor:
        """Return A or B; keep the other for the next call."""
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
        factors = [(m.weight, read_factors(m.file, path, self.reader, experts=count)) for m, _, count in parts]
        experts = parts[0][2]

        @functools.cache
        def weight() -> Tensor:
            assert self.base is not None
            return self.base.weights[f"{path}.weight"].whole(self.reader)

        if experts is None:
            each = [combine(factors, self.request, path, weight)]
        else:
            each = []
            for expert in range(experts):
                own = [(w, Factors(A=f.A[expert], B=f.B[expert], scaling=f.scaling)) for w, f in factors]
                each.append(combine(own, self.request, f"{path}.{expert}", weight))
        if each[0].energy is not None:
            self.energy[path] = (sum(one.energy or 0.0 for one in each), sum(one.dropped for one in each))
        a, b = torch.stack([made.A for made in each]), torch.stack([made.B for made in each])
        # PEFT's layout: row e * R + j of A, column j * E + e of B.
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


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
    alone = Ranks(0, 1, torch.device("cpu"), None)
    backend = Backend(alone, Shards.over(alone, 1))
    with Reader() as reader:
        made = Combination(request, reader, say)
        say.line(f"combining {len(made.members)} adapters, {len(made.paths):,} weights, by {request.method}")
        for_nf4 = any(member.file.settings["init_from_loftq"] for member in made.members)
        with new_folder(out) as folder:
            files = {CONFIG_NAME: made.config(), WEIGHTS_NAME: made.tensors()}
            write_files(folder, files, backend, metadata=NF4_MARK if for_nf4 else {})
            owner = None if made.base is None else new_token_owner(made.members, made.base)
            if owner is not None:  # The tokenizer that an adapter with new tokens is published with.
                for path in owner.file.folder.iterdir():
                    if path.is_file() and path.name not in (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME, "README.md"):
                        shutil.copy2(path, folder / path.name)
            found = record(request, made, folder)
            atomic_io.write_json(folder / RECORD_NAME, found)
    return found


def main(request: CombineRequest) -> int:
    """Combine adapters; return the exit code."""
    quieten()

    def work() -> int:
        found = run(request)
        print(summary_line(request, found))
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
        "version": __version__,
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


def summary_line(request: CombineRequest, found: Mapping[str, Any]) -> str:
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
