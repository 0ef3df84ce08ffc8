"""Compute the weights of a combined adapter one at a time as its file is written, and its adapter_config.json."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import read_header
from distlora.architecture.targets import match_ending, peft_paths
from distlora.architecture.tokens import EMBEDDING
from distlora.config.json_files import read_object
from distlora.loading.tensor_files import DeferredTensor
from distlora.post.adapter_factors import AdapterFile, Factors
from distlora.post.base_weights import Base, open_base
from distlora.post.combine.members import needs_base
from distlora.post.combine.methods import Combined, Part, combine
from distlora.post.combine.request import CombineRequest
from distlora.post.combine.whole_modules import Weighted, combined_modules, combined_rows, row_ids
from distlora.post.trained import base_spec
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import Reader


class Combination:
    """The weights of the result, computed one at a time as the file is written."""

    def __init__(self, request: CombineRequest, reader: Reader, say: Callable[[str], None]) -> None:
        self.request, self.reader, self.say = request, reader, say
        self.members = [
            Weighted(member.place, member.weight, AdapterFile.open(Path(member.folder)), header_of(member.folder))
            for member in request.members
        ]
        files = [member.file for member in self.members]
        self.base: Base | None = None
        if needs_base([file.read for file in files]):
            assert request.base_folder is not None
            self.base = open_base(base_spec(request.base_folder, request.quant, dtype=request.held))
        self.paths = sorted({path for file in files for path in file.paths})
        self.fused = {
            path for file in files for path in match_ending(file.settings.target_parameters, list(file.paths))
        }
        self.ranks = {path: self._rank(path) for path in self.paths}
        self.energy: dict[str, tuple[float, float]] = {}
        """By path: ||dW||^2 and the part of it that the rank dropped, for truncated weights."""
        self._made: dict[str, tuple[Tensor, Tensor]] = {}
        self._done = 0

    def tensors(self) -> dict[str, Tensor | DeferredTensor]:
        """Return the tensors by PEFT's names."""
        places = peft_paths(self.fused)
        found: dict[str, Tensor | DeferredTensor] = {}
        for path in self.paths:
            shapes = self._shapes(path)
            for part, shape in zip("AB", shapes, strict=True):
                name = f"base_model.model.{places.get(path, path)}.lora_{part}.weight"
                make = functools.partial(self._make, path, part)
                found[name] = DeferredTensor(shape=torch.Size(shape), dtype=torch.float32, make=make)
        if self.base is not None:
            found |= combined_rows(self.members, self.base, self.reader)
            found |= combined_modules(self.members, self.base, self.reader)
        return found

    def config(self) -> dict[str, Any]:
        """Return adapter_config.json: the first member's with the result's ranks, targets and scale 1."""
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
        """Return the union of the members' target names; a pattern is expanded to its paths."""
        found: set[str] = set()
        for member in self.members:
            entries = member.file.settings.target_modules
            linears = [path for path in member.file.paths if path not in self.fused]
            found.update(linears if isinstance(entries, str) else entries)
        return sorted(found)

    def _parameters(self) -> list[str]:
        return sorted({entry for member in self.members for entry in member.file.settings.target_parameters})

    def _parts(self, path: str) -> list[tuple[Weighted, int, int | None]]:
        """Return (member, rank, experts) of the members that adapt a weight; experts is None unless fused."""
        found = []
        for member in self.members:
            if path in member.file.paths:
                rank = member.file.settings.rank_of(path)
                rows = member.file.read.tensors[path, "A"].shape[0]
                found.append((member, rank, rows // rank if path in self.fused else None))
        return found

    def _sizes(self, path: str) -> tuple[int, int]:
        """Return (out, in) of a weight, or of each expert's."""
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
        # PEFT's layout: row e * R + j of A, column j * E + e of B.
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    def _note(self, path: str, made: Sequence[Combined]) -> None:
        if made[0].energy is not None:
            self.energy[path] = (sum(one.energy or 0.0 for one in made), sum(one.dropped for one in made))


def header_of(folder: str) -> Mapping[str, Any]:
    """Return the safetensors header of an adapter's folder."""
    return read_header(Path(folder) / WEIGHTS_NAME)
