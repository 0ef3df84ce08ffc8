"""The worker of `distlora combine`: sum adapters weight by weight, by PEFT's functions and exact sums that PEFT lacks.

O out features, I in features, R ranks, K their sum. Adapter i adds dW_i = s_i B_i A_i (with DoRA the adapted weight
minus W) and has the weight w_i. Rows and modules that were trained beside the adapters (embedding, LM head) are summed
exactly: base + sum w_i (theirs_i - base). A new token's row has no base value, so only one adapter may bring such rows,
with the weight 1.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distlora import __version__
from distlora.architecture.safetensors_headers import read_header
from distlora.architecture.targets import match_ending, peft_paths, peft_pattern
from distlora.architecture.tokens import EMBEDDING
from distlora.config import UserError, require
from distlora.config.json_files import read_object
from distlora.loading.tensor_files import new_folder, write_files
from distlora.parallel import Backend, Ranks, Shards
from distlora.post.combine import CombineRequest
from distlora.post.trained import COMBINED, base_spec
from distlora.post.weights import BaseWeight, Factors, adapted_rows, open_base, read_factors, read_token_rows
from distlora.results.record import Record, Table
from distlora.system import atomic_io
from distlora.system.atomic_io import sha256
from distlora.system.import_peft import import_peft
from distlora.system.progress import ProgressLines
from distlora.system.randomness import key_of
from distlora.weights.peft_folder import CONFIG_NAME, NF4_MARK, WEIGHTS_NAME, read_peft_adapter
from distlora.weights.reader import Reader, all_finite

Part = tuple[float, Factors]
"""An adapter's weight in the sum, and its factors for a base weight or for one of its experts."""


class CombinedFactors(NamedTuple):
    """The combined factors: the weight gets B A, with scale 1."""

    A: Tensor
    """(R, I) fp32."""
    B: Tensor
    """(O, R) fp32."""
    energy: float | None = None
    """||dW||^2 (Frobenius) of the exact result, if it was truncated."""
    dropped: float = 0.0
    """||dW - B A||^2: the squares of the dropped singular values."""


@torch.no_grad()
def combine(parts: Sequence[Part], request: CombineRequest, path: str, base: Callable[[], Tensor]) -> CombinedFactors:
    """Combine the parts by the request's method. `base` returns W (O, I) in fp32, for DoRA."""
    how, scales = request.how, [weight * factors.scaling for weight, factors in parts]
    rank = request.rank or max(factors.rank for _, factors in parts)
    if "seed" in how.options:
        torch.manual_seed(key_of(request.seed or 0, path)[0])
    if how.on == "factors":  # Weights are the root of |w s|, with the sign in A, as in add_weighted_adapter.
        roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
        signed = torch.tensor([math.copysign(math.sqrt(abs(scale)), scale) for scale in scales])
        a = merged([factors.A for _, factors in parts], signed, request)
        return CombinedFactors(a, merged([factors.B for _, factors in parts], roots, request))
    if not how.function and all(factors.magnitude is None for _, factors in parts):
        # sum w_i s_i B_i A_i = [B_1 ...] [w_1 s_1 A_1; ...], scaled in the order of PEFT's `cat`.
        a = torch.cat([factors.A * weight * factors.scaling for weight, factors in parts])
        b = torch.cat([factors.B for _, factors in parts], dim=1)
        return CombinedFactors(a, b) if how.on == "sum" else truncated(a, b, rank)
    deltas = [f.delta() if f.magnitude is None else adapted_rows(base(), 0, f) - base() for _, f in parts]
    weights = torch.tensor([weight for weight, _ in parts])
    if not how.function:
        return truncated_dense(torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(0), rank)
    return truncated_dense(merged(deltas, weights, request), rank)


def merged(tensors: list[Tensor], weights: Tensor, request: CombineRequest) -> Tensor:
    """Call PEFT's function of the method."""
    values = {"density": request.density, "majority_sign_method": request.majority_sign_method or "total"}
    settings = {name: value for name, value in values.items() if name in request.how.options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "density >= 1: no pruning".
        result: Tensor = getattr(import_peft().utils.merge_utils, request.how.function)(tensors, weights, **settings)
    return result


def truncated(a: Tensor, b: Tensor, rank: int) -> CombinedFactors:
    """Return the best LoRA of a rank (Eckart and Young 1936) without forming B A.

    With B = Q_b R_b and A^T = Q_a R_a, the singular values are those of R_b R_a^T (K, K). Takes O(K^2 (O + I)) fp64
    operations.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    energy, dropped = float(s.square().sum()), float(s[rank:].square().sum())
    return balanced(q_b @ u[:, :rank], s[:rank], v[:rank] @ q_a.T, energy, dropped)


def truncated_dense(whole: Tensor, rank: int) -> CombinedFactors:
    """Return the same for a dense (O, I), from the eigenvectors of its smaller Gram matrix in fp64.

    Their error, eps (s_1 / s_j)^2 of the gaps, is below what fp32 factors can show.
    """
    exact = whole.double()
    flipped = exact.shape[0] > exact.shape[1]
    tall = exact.T if flipped else exact
    u = torch.linalg.eigh(tall @ tall.T)[1].flip(1)[:, :rank]
    v = u.T @ tall
    s = torch.linalg.vector_norm(v, dim=1)
    v = v / torch.where(s > 0, s, 1.0)[:, None]
    energy = float(exact.square().sum())
    dropped = max(0.0, energy - float(s.square().sum()))
    return balanced(v.T, s, u.T, energy, dropped) if flipped else balanced(u, s, v, energy, dropped)


def balanced(u: Tensor, s: Tensor, v: Tensor, energy: float, dropped: float) -> CombinedFactors:
    """Return U S V with the root of S on each side (PEFT: in B), so that further training has one scale for both."""
    root = s.sqrt()
    return CombinedFactors((root[:, None] * v).float(), (u * root).float(), energy, dropped)


class Combination:
    """The tensors and the config of the result."""

    def __init__(self, request: CombineRequest, reader: Reader, say: Callable[[str], None]) -> None:
        self._request, self._reader = request, reader
        self.members = [(member, read_peft_adapter(member.folder)) for member in request.members]
        self.files = files = [file for _, file in self.members]
        if request.base_folder is not None:
            assert request.quant is not None
            self._base = open_base(base_spec(request.base_folder, request.quant, dtype=request.held))
        self.fused = {
            path for file in files for path in match_ending(file.adapter_config.target_parameters, file.paths)
        }
        self.tensors: dict[str, Tensor] = {}
        """The result by PEFT's names, fp32."""
        self.ranks: dict[str, int] = {}
        self.energy: dict[str, tuple[float, float]] = {}
        """||dW||^2 and the part of it that the rank dropped, by path of a truncated weight."""
        paths, places = sorted({path for file in files for path in file.paths}), peft_paths(self.fused)
        for done, path in enumerate(paths, 1):
            name = f"base_model.model.{places.get(path, path)}"
            self.tensors[f"{name}.lora_A.weight"], self.tensors[f"{name}.lora_B.weight"] = self._combined(path)
            say(f"combining: {done:,}/{len(paths):,} weights, {path}")
        self.row_ids: dict[str, list[int]] = {}
        """Trained rows by matrix."""
        self.tokenizer: Path | None = None
        """Folder of the adapter with new tokens, whose tokenizer the sum needs."""
        for matrix in sorted({name for file in files for name in (*file.token_rows, *file.modules)}):
            architecture, embedding = self._base.model.architecture, self._base.weights[self._base.embedding_name]
            is_head = matrix != EMBEDDING
            weight = self._base.weights.get(self._base.head_name, embedding) if is_head else embedding
            name = f"base_model.model.{architecture.head if is_head else architecture.embedding_path}"
            self._check(matrix, weight)
            ids = sorted({id for file in files if matrix in file.token_rows for id in file.token_rows[matrix].ids})
            if ids:
                self.row_ids[matrix] = ids
                self.tensors[f"{name}.token_adapter.trainable_tokens_delta"] = self._summed_rows(matrix, weight, ids)
            else:
                self.tensors[f"{name}.weight"] = self._summed_whole(matrix, weight)

    def config(self) -> dict[str, Any]:
        """Return adapter_config.json: the first member's with the result's ranks, targets and scale 1."""
        ranks, rows = list(self.ranks.values()), self.row_ids
        most = max(set(ranks), key=ranks.count)
        as_parameters = {path for file in self.files for path in file.parameters}
        others = peft_pattern({path: rank for path, rank in self.ranks.items() if rank != most}, as_parameters)
        targets, parameters = set[str](), set[str]()
        for file in self.files:
            entries = file.adapter_config.target_modules
            # A pattern is expanded to its paths.
            modules = set(file.paths) - self.fused if isinstance(entries, str) else entries
            targets.update(entry for entry in modules if not match_ending([entry], list(file.parameters)))
            parameters.update(file.adapter_config.target_parameters, (f"{path}.weight" for path in file.parameters))
        config = {
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
            "modules_to_save": sorted({name for file in self.files for name in file.modules}) or None,
        }
        first = read_object(self.files[0].folder / CONFIG_NAME, "save the adapter again")
        return first | config | ({"target_parameters": sorted(parameters)} if parameters else {})

    def _combined(self, path: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight."""
        members = [(member.weight, file) for member, file in self.members if path in file.paths]
        _, first = members[0]
        experts = first.tensors[path, "A"].shape[0] // first.adapter_config.rank_of(path) if path in self.fused else 1
        parts = [(weight, read_factors(file, path, self._reader, experts=experts)) for weight, file in members]

        @functools.cache
        def whole() -> Tensor:
            return self._base.weights[f"{path}.weight"].whole(self._reader)

        made = []
        for n in range(experts):
            own = [(weight, dataclasses.replace(product, A=product.A[n], B=product.B[n])) for weight, product in parts]
            made.append(combine(own, self._request, f"{path}.{n}" if path in self.fused else path, whole))
        if made[0].energy is not None:
            self.energy[path] = sum(product.energy or 0.0 for product in made), sum(product.dropped for product in made)
        self.ranks[path] = len(made[0].A)
        a, b = torch.stack([product.A for product in made]), torch.stack([product.B for product in made])
        # PEFT's layout: row e * R + j of A, column j * E + e of B.
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    def _check(self, matrix: str, weight: BaseWeight) -> None:
        """Refuse rows of new tokens without an exact sum; note the adapter whose tokenizer has them."""
        owners = []
        for member, file in self.members:
            require(
                matrix not in file.modules or file.modules[matrix].shape == weight.shape,
                f"{member.place} has {matrix} of another size than the base's {list(weight.shape)}: rows of new tokens "
                "have no exact sum; leave it out",
            )
            if matrix in file.token_rows and max(file.token_rows[matrix].ids) >= weight.shape[0]:
                owners.append(member)
                self.tokenizer = file.folder
        if owners and (len(owners) > 1 or owners[0].weight != 1):
            raise UserError(
                f"{' and '.join(member.place for member in owners)} trained new tokens (rows of {matrix} from "
                f"{weight.shape[0]:,} on), which the base does not have, so they cannot be scaled; one adapter with "
                f"new tokens can be in a sum, with the weight 1: {owners[0].place}=1"
            )

    def _summed_rows(self, matrix: str, weight: BaseWeight, ids: list[int]) -> Tensor:
        """Return the summed rows of a matrix, (ids, width) fp32."""
        stored, width = weight.shape
        rows = [(member.weight, read_token_rows(file, matrix, self._reader)) for member, file in self.members]
        total = torch.zeros(len(ids), width)
        for at, id in enumerate(ids):
            start = torch.zeros(width)
            if id < stored:
                start = self._reader.read(weight.source.segments, id * width, (id + 1) * width).float()
            total[at] = start
            for factor, of_file in rows:
                if id in of_file:
                    total[at] += factor * (of_file[id] - start)
        return self._finite(matrix, total)

    def _summed_whole(self, matrix: str, weight: BaseWeight) -> Tensor:
        """Return the summed matrix, fp32; of the base and of the adapters it holds one chunk."""
        theirs = [
            (member.weight, read_header(file.folder / WEIGHTS_NAME)[file.modules[matrix].name])
            for member, file in self.members
            if matrix in file.modules
        ]
        total, first = torch.empty(weight.numel), 0
        for start in weight.chunks(self._reader, original=True):
            stop = first + len(start)
            total[first:stop] = start
            for factor, segment in theirs:
                total[first:stop] += factor * (self._reader.read([segment], first, stop).float() - start)
            first = stop
        return self._finite(matrix, total.view(weight.shape))

    def _finite(self, matrix: str, total: Tensor) -> Tensor:
        require(
            all_finite(total),
            f"{matrix} holds NaN or Inf in the base or in {', '.join(member.place for member, _ in self.members)}; "
            "leave it out (`distlora verify` finds it in a run)",
        )
        return total


def run(request: CombineRequest) -> dict[str, Any]:
    """Write the folder in PEFT's format, completely or not at all; return its record."""
    say, alone = ProgressLines(), Ranks(0, 1, torch.device("cpu"), None)
    say.line(f"combining {len(request.members)} adapters by {request.method}")
    with Reader() as reader:
        made = Combination(request, reader, say)
    is_for_nf4 = any(file.settings["init_from_loftq"] for file in made.files)
    with new_folder(Path(request.out)) as folder:
        files = {CONFIG_NAME: made.config(), WEIGHTS_NAME: made.tensors}
        write_files(folder, files, Backend(alone, Shards.over(alone, 1)), metadata=NF4_MARK if is_for_nf4 else {})
        for path in () if made.tokenizer is None else made.tokenizer.iterdir():
            if path.is_file() and path.name not in (CONFIG_NAME, WEIGHTS_NAME, COMBINED, "README.md"):
                shutil.copy2(path, folder / path.name)
        figures = describe(request, made, folder)
        atomic_io.write_json(folder / COMBINED, figures)
    return figures


def describe(request: CombineRequest, made: Combination, folder: Path) -> dict[str, Any]:
    """Return combine.json."""
    options = request.how.options
    return {
        "command": request.command,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "version": __version__,
        "method": request.method,
        "rank": request.rank,
        "density": request.density,
        "majority_sign_method": request.majority_sign_method or "total" if "majority_sign_method" in options else None,
        "seed": request.seed or 0 if "seed" in options else None,
        "base_fingerprint": next((member.base for member in request.members if member.base), None),
        "quant": request.quant,
        "members": [
            {name: getattr(member, name) for name in ("place", "weight", "quant", "pissa")}
            | {"sha256": sha256(Path(member.folder) / WEIGHTS_NAME)}
            for member in request.members
        ],
        "sha256": sha256(folder / WEIGHTS_NAME),
        "weights": len(made.ranks),
        "ranks": {"smallest": min(made.ranks.values()), "largest": max(made.ranks.values())},
        "truncation": _truncation(made.energy) if made.energy else None,
    }


def _truncation(energy: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Return Frobenius norms over all weights, and the weight that lost the largest share."""

    def share(whole: float, dropped: float) -> float:
        return math.sqrt(dropped / whole) if whole > 0 else 0.0

    whole, dropped = (sum(values) for values in zip(*energy.values(), strict=True))
    worst = max(energy, key=lambda path: share(*energy[path]))
    return {
        "norm": math.sqrt(whole),
        "dropped": math.sqrt(dropped),
        "share": share(whole, dropped),
        "worst": {"path": worst, "share": share(*energy[worst])},
    }


def record(request: CombineRequest, figures: Mapping[str, Any]) -> Record:
    """Return combine.json as a record."""
    low, high = figures["ranks"]["smallest"], figures["ranks"]["largest"]
    lost = figures["truncation"]
    findings = [f"{figures['weights']} weights, {f'rank {high}' if low == high else f'ranks {low} to {high}'}"]
    if lost is not None:
        findings.append(
            f"the rank dropped {lost['share']:.2%} of ||dW|| = {lost['norm']:.4g} over all weights, at most "
            f"{lost['worst']['share']:.2%} of one ({lost['worst']['path']})"
        )
    findings.append(f"wrote {request.out}: an adapter in PEFT's format, and {COMBINED}")
    rows = [(member.place, member.weight, member.quant or "unknown") for member in request.members]
    columns = {"adapter": "", "weight": "g", "base held in": ""}
    title = f"{request.method}: {request.how.what}"
    return Record(title=title, tables=[Table(title, columns, rows)], findings=findings, data=figures)


def main(request: CombineRequest) -> None:
    """Combine adapters and print the record."""
    print(record(request, run(request)).text())
