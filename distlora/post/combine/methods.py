"""Several adapters of one weight made one.

O out features, I in features, R ranks, K their sum. An adapter i adds dW_i = s_i B_i A_i, with DoRA what that makes of
W less W, and has the weight w_i.
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
    """What one adapter has for the weight: no experts, which go by one after the other."""

    weight: float
    factors: Factors


@dataclass(frozen=True, slots=True)
class Combined:
    """B A is what the weight gets, with scale 1."""

    A: Tensor
    """(R, I) fp32."""
    B: Tensor
    """(O, R) fp32."""
    energy: float | None = None
    """||dW||^2 (Frobenius) of what was asked for, where it was truncated."""
    dropped: float = 0.0
    """||dW - B A||^2: the squares of the singular values that the rank has no place for."""


@torch.no_grad()
def combine(parts: Sequence[Part], request: CombineRequest, path: str, base: Callable[[], Tensor]) -> Combined:
    """`base` gives W, (O, I) fp32; it is asked where a part is DoRA."""
    how = request.how
    if how.on == "sum":
        return concatenated(parts)
    rank = request.rank or max(part.factors.rank for part in parts)
    if request.method == "svd" and all(part.factors.magnitude is None for part in parts):
        return truncated(concatenated(parts), rank)
    with torch.random.fork_rng(devices=[], enabled=how.draws), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "density >= 1: no pruning".
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
    """sum w_i s_i B_i A_i = [B_1 ...] [w_1 s_1 A_1; ...]: a LoRA of rank K, exactly. The scales are in A, as PEFT's
    `cat` has them, and multiplied in its order."""
    a = torch.cat([part.factors.A * part.weight * part.factors.scaling for part in parts])
    return Combined(a, torch.cat([part.factors.B for part in parts], dim=1))


def truncated(exact: Combined, rank: int) -> Combined:
    """The best LoRA of a rank (Eckart and Young 1936), without B A: B = Q_b R_b and A^T = Q_a R_a leave the singular
    values of R_b R_a^T (K, K). fp64: O(K^2 (O + I)) operations."""
    q_b, r_b = torch.linalg.qr(exact.B.double())
    q_a, r_a = torch.linalg.qr(exact.A.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return balanced(
        q_b @ u[:, :rank], s[:rank], v[:rank] @ q_a.T, float(s.square().sum()), float(s[rank:].square().sum())
    )


def truncated_dense(whole: Tensor, rank: int) -> Combined:
    """The same of a dense (O, I): the eigenvectors of its smaller Gram matrix in fp64, n = min(O, I). They are good to
    eps (s_1 / s_j)^2 of the gaps, which costs the truncation nothing that fp32 factors could show."""
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
    """U S V with the root of S on each side: what trains on from it has A and B of one size. PEFT has all of S in B."""
    root = s.sqrt()
    return Combined((root[:, None] * v).float(), (u * root).float(), energy, dropped)


def apart(parts: Sequence[Part], request: CombineRequest) -> Combined:
    """A and B each by PEFT's function, weighted by the root of |w s|, with its sign in A: add_weighted_adapter's way.

    Of `linear` that is (sum r_i B_i)(sum r_i A_i): the products of one adapter's B with another's A come in too.
    """
    scales = [part.weight * part.factors.scaling for part in parts]
    weights_b = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
    weights_a = torch.tensor([math.sqrt(abs(scale)) * (1 if scale >= 0 else -1) for scale in scales])
    a = merged([part.factors.A for part in parts], weights_a, request)
    return Combined(a, merged([part.factors.B for part in parts], weights_b, request))


def merged(tensors: list[Tensor], weights: Tensor, request: CombineRequest) -> Tensor:
    """PEFT's function of the method."""
    from peft.utils import merge_utils

    how = request.how
    settings: dict[str, Any] = {"density": request.density} if how.has_density else {}
    if how.elects:
        settings["majority_sign_method"] = request.majority_sign_method
    result: Tensor = getattr(merge_utils, how.function)(tensors, weights, **settings)
    return result


def delta_of(factors: Factors, base: Callable[[], Tensor]) -> Tensor:
    """What an adapter adds to the weight, dense."""
    if factors.magnitude is None:
        return factors.delta()
    weight = base()
    return adapted_rows(weight, 0, factors) - weight
