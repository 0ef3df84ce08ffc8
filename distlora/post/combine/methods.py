"""Combine several adapters of one weight into one.

O out features, I in features, R ranks, K their sum. Adapter i adds dW_i = s_i B_i A_i (with DoRA the adapted weight
minus W) and has the weight w_i.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distlora.post.adapter_factors import Factors, adapted_rows
from distlora.post.combine.request import CombineRequest
from distlora.system.randomness import key_of


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's factors for a weight, or for one of its experts."""

    weight: float
    factors: Factors


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
    """Combine the parts by the request's method. `base` returns W (O, I) in fp32; it is called for DoRA."""
    how = request.how
    if how.on == "sum":
        return concatenated(parts)
    rank = request.rank or max(part.factors.rank for part in parts)
    if request.method == "svd" and all(part.factors.magnitude is None for part in parts):
        return truncated(concatenated(parts), rank)
    with torch.random.fork_rng(devices=[], enabled=how.draws), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns: "density >= 1: no pruning".
        if how.draws:
            torch.manual_seed(key_of(request.seed, path)[0])
        if how.on == "factors":
            return apart(parts, request)
        deltas = [delta_of(part.factors, base) for part in parts]
        weights = torch.tensor([part.weight for part in parts])
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
    a = torch.cat([part.factors.A * part.weight * part.factors.scaling for part in parts])
    return Combined(a, torch.cat([part.factors.B for part in parts], dim=1))


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
    scales = [part.weight * part.factors.scaling for part in parts]
    weights_b = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
    weights_a = torch.tensor([math.sqrt(abs(scale)) * (1 if scale >= 0 else -1) for scale in scales])
    a = merged([part.factors.A for part in parts], weights_a, request)
    return Combined(a, merged([part.factors.B for part in parts], weights_b, request))


def merged(tensors: list[Tensor], weights: Tensor, request: CombineRequest) -> Tensor:
    """Call PEFT's function of the method."""
    from peft.utils import merge_utils

    how = request.how
    settings: dict[str, Any] = {"density": request.density} if how.has_density else {}
    if how.elects:
        settings["majority_sign_method"] = request.majority_sign_method
    result: Tensor = getattr(merge_utils, how.function)(tensors, weights, **settings)
    return result


def delta_of(factors: Factors, base: Callable[[], Tensor]) -> Tensor:
    """Return what an adapter adds to the weight, dense."""
    if factors.magnitude is None:
        return factors.delta()
    weight = base()
    return adapted_rows(weight, 0, factors) - weight
