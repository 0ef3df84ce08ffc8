"""Combine several adapters of one weight into one, and sum what was trained beside them: embedding and LM head.

O out features, I in features, R ranks, K their sum. Adapter i adds dW_i = s_i B_i A_i (with DoRA the adapted weight
minus W) and has the weight w_i. Rows and modules are summed exactly: base + sum w_i (module_i - base). A new token's
row has no base value, so only one adapter may bring such rows, with the weight 1.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import read_header
from distlora.architecture.tokens import EMBEDDING
from distlora.config import UserError
from distlora.loading.tensor_files import READ_ELEMENTS, DeferredTensor
from distlora.post.combine.request import CombineRequest
from distlora.post.weights import Base, BaseWeight, Factors, adapted_rows, read_token_rows
from distlora.system.randomness import key_of
from distlora.weights.peft_folder import WEIGHTS_NAME, PeftAdapter
from distlora.weights.reader import Reader, all_finite

Part = tuple[float, Factors]
"""An adapter's weight in the sum, and its factors for a base weight or for one of its experts."""


@dataclass(frozen=True, slots=True)
class Combined:
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
def combine(parts: Sequence[Part], request: CombineRequest, path: str, base: Callable[[], Tensor]) -> Combined:
    """Combine the parts by the request's method. `base` returns W (O, I) in fp32, for DoRA."""
    how = request.how
    if how.on == "sum":
        return concatenated(parts)
    rank = request.rank or max(factors.rank for _, factors in parts)
    if request.method == "svd" and all(factors.magnitude is None for _, factors in parts):
        return truncated(concatenated(parts), rank)
    with torch.random.fork_rng(devices=[], enabled=how.draws), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns: "density >= 1: no pruning".
        if how.draws:
            torch.manual_seed(key_of(request.seed, path)[0])
        if how.on == "factors":
            return apart(parts, request)
        deltas = []
        for _, factors in parts:
            deltas.append(factors.delta() if factors.magnitude is None else adapted_rows(base(), 0, factors) - base())
        weights = torch.tensor([weight for weight, _ in parts])
        if request.method == "svd":
            whole = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
        else:
            whole = merged(deltas, weights, request)
    assert isinstance(whole, Tensor)
    return truncated_dense(whole, rank)


def concatenated(parts: Sequence[Part]) -> Combined:
    """Return sum w_i s_i B_i A_i = [B_1 ...] [w_1 s_1 A_1; ...], an exact LoRA of rank K.

    The scales are multiplied into A in the order of PEFT's `cat`.
    """
    a = torch.cat([factors.A * weight * factors.scaling for weight, factors in parts])
    return Combined(a, torch.cat([factors.B for _, factors in parts], dim=1))


def truncated(exact: Combined, rank: int) -> Combined:
    """Return the best LoRA of a rank (Eckart and Young 1936) without forming B A.

    With B = Q_b R_b and A^T = Q_a R_a, the singular values are those of R_b R_a^T (K, K). Takes O(K^2 (O + I)) fp64
    operations.
    """
    q_b, r_b = torch.linalg.qr(exact.B.double())
    q_a, r_a = torch.linalg.qr(exact.A.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return balanced(
        q_b @ u[:, :rank], s[:rank], v[:rank] @ q_a.T, float(s.square().sum()), float(s[rank:].square().sum())
    )


def truncated_dense(whole: Tensor, rank: int) -> Combined:
    """Return the same for a dense (O, I), from the eigenvectors of its smaller Gram matrix in fp64.

    Their error, eps (s_1 / s_j)^2 of the gaps, is below what fp32 factors can show.
    """
    exact = whole.double()
    flipped = exact.shape[0] > exact.shape[1]
    tall = exact.T if flipped else exact
    _, vectors = torch.linalg.eigh(tall @ tall.T)
    u = vectors.flip(1)[:, :rank]
    v = u.T @ tall
    s = torch.linalg.vector_norm(v, dim=1)
    v = v / torch.where(s > 0, s, 1.0)[:, None]
    energy = float(exact.square().sum())
    dropped = max(0.0, energy - float(s.square().sum()))
    return balanced(v.T, s, u.T, energy, dropped) if flipped else balanced(u, s, v, energy, dropped)


def balanced(u: Tensor, s: Tensor, v: Tensor, energy: float, dropped: float) -> Combined:
    """Return U S V with the root of S on each side, so that A and B have one scale for further training.

    PEFT puts S in B.
    """
    root = s.sqrt()
    return Combined((root[:, None] * v).float(), (u * root).float(), energy, dropped)


def apart(parts: Sequence[Part], request: CombineRequest) -> Combined:
    """Combine A and B separately with PEFT's function, as add_weighted_adapter does.

    Weights are the root of |w s|, with the sign in A. For `linear` this gives (sum r_i B_i)(sum r_i A_i), which
    includes products across adapters.
    """
    scales = [weight * factors.scaling for weight, factors in parts]
    weights_b = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
    weights_a = torch.tensor([math.sqrt(abs(scale)) * (1 if scale >= 0 else -1) for scale in scales])
    a = merged([factors.A for _, factors in parts], weights_a, request)
    return Combined(a, merged([factors.B for _, factors in parts], weights_b, request))


def merged(tensors: list[Tensor], weights: Tensor, request: CombineRequest) -> Tensor:
    """Call PEFT's function of the method."""
    from peft.utils import merge_utils

    how = request.how
    settings: dict[str, Any] = {"density": request.density} if how.has_density else {}
    if how.elects:
        settings["majority_sign_method"] = request.majority_sign_method
    result: Tensor = getattr(merge_utils, how.function)(tensors, weights, **settings)
    return result


@dataclass(frozen=True, slots=True)
class Weighted:
    """A member with its opened adapter."""

    place: str
    weight: float
    file: PeftAdapter


def matrix_of(base: Base, matrix: str) -> BaseWeight:
    """Return the base's embedding or head; a tied head is the embedding."""
    embedding = base.weights[base.embedding_name]
    return embedding if matrix == EMBEDDING else base.weights.get(base.head_name, embedding)


def _peft_name(base: Base, matrix: str) -> str:
    architecture = base.model.architecture
    return f"base_model.model.{architecture.embedding_path if matrix == EMBEDDING else architecture.head}"


def row_ids(members: Sequence[Weighted]) -> dict[str, list[int]]:
    """Return the rows that any member trained, by matrix."""
    found: dict[str, set[int]] = {}
    for member in members:
        for matrix, rows in member.file.token_rows.items():
            found.setdefault(matrix, set()).update(rows.ids)
    return {matrix: sorted(ids) for matrix, ids in found.items()}


def combined_rows(members: Sequence[Weighted], base: Base, reader: Reader) -> dict[str, Tensor]:
    """Return the summed rows by PEFT's names. Raises UserError for new tokens without an exact sum."""
    tensors = {}
    for matrix, ids in row_ids(members).items():
        weight = matrix_of(base, matrix)
        stored, width = weight.shape
        _check_new(members, matrix, stored)
        rows = torch.zeros(len(ids), width)
        for at, id in enumerate(ids):
            if id < stored:
                rows[at] = reader.read(weight.source.segments, id * width, (id + 1) * width).float()
        start, places = rows.clone(), {id: at for at, id in enumerate(ids)}
        for member in members:
            for id, row in read_token_rows(member.file, matrix, reader).items():
                rows[places[id]] += member.weight * (row - start[places[id]])
        tensors[f"{_peft_name(base, matrix)}.token_adapter.trainable_tokens_delta"] = rows
    return tensors


def _check_new(members: Sequence[Weighted], matrix: str, stored: int) -> None:
    with_rows = [member for member in members if matrix in member.file.token_rows]
    owners = [member for member in with_rows if max(member.file.token_rows[matrix].ids) >= stored]
    if owners and (len(owners) > 1 or owners[0].weight != 1):
        raise UserError(
            f"{' and '.join(member.place for member in owners)} trained new tokens (rows of {matrix} from {stored:,} "
            "on), which the base does not have, so they cannot be scaled; one adapter with new tokens can "
            f"be in a sum, with the weight 1: {owners[0].place}=1"
        )


def combined_modules(members: Sequence[Weighted], base: Base, reader: Reader) -> dict[str, DeferredTensor]:
    """Return the summed modules by PEFT's names, computed as they are written.

    Raises UserError for another size than the base's.
    """
    tensors = {}
    for matrix in sorted({name for member in members for name in member.file.modules}):
        weight = matrix_of(base, matrix)
        mine = [member for member in members if matrix in member.file.modules]
        for member in mine:
            if member.file.modules[matrix].shape != weight.shape:
                raise UserError(
                    f"{member.place} has {matrix} of {list(member.file.modules[matrix].shape)}, and the base's is "
                    f"{list(weight.shape)}: rows of new tokens have no exact sum; leave it out"
                )
        make = functools.partial(_summed_module, mine, matrix, weight, reader)
        module = DeferredTensor(shape=torch.Size(weight.shape), dtype=torch.float32, make=make)
        tensors[f"{_peft_name(base, matrix)}.weight"] = module
    return tensors


def _summed_module(members: Sequence[Weighted], matrix: str, weight: BaseWeight, reader: Reader) -> Tensor:
    whole = torch.empty(weight.numel)
    segments = [read_header(m.file.folder / WEIGHTS_NAME)[m.file.modules[matrix].name] for m in members]
    for first in range(0, weight.numel, READ_ELEMENTS):
        stop = min(first + READ_ELEMENTS, weight.numel)
        start = reader.read(weight.source.segments, first, stop).float()
        whole[first:stop] = start
        for member, segment in zip(members, segments, strict=True):
            whole[first:stop] += member.weight * (reader.read([segment], first, stop).float() - start)
    if not all_finite(whole):
        raise UserError(
            f"{matrix} holds NaN or Inf in the base or in {', '.join(m.place for m in members)}; leave it out "
            "(`distlora verify` finds it in a run)"
        )
    return whole.view(weight.shape)


def new_token_owner(members: Sequence[Weighted], base: Base) -> Weighted | None:
    """Return the member whose tokenizer the sum needs."""
    for member in members:
        for matrix, rows in member.file.token_rows.items():
            if max(rows.ids) >= matrix_of(base, matrix).shape[0]:
                return member
    return None
