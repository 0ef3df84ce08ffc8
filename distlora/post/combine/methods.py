"""Combine several adapters of one weight into one: PEFT's functions, and the exact sums that PEFT lacks.

O out features, I in features, R ranks, K their sum. Adapter i adds dW_i = s_i B_i A_i (with DoRA the adapted weight
minus W) and has the weight w_i.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distlora.post.combine.request import CombineRequest
from distlora.post.weights import Factors, adapted_rows
from distlora.system.randomness import key_of

Part = tuple[float, Factors]
"""An adapter's weight in the sum, and its factors for a base weight or for one of its experts."""


class Combined(NamedTuple):
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
    how, scales = request.how, [weight * factors.scaling for weight, factors in parts]
    rank = request.rank or max(factors.rank for _, factors in parts)
    if "seed" in how.options:
        torch.manual_seed(key_of(request.seed or 0, path)[0])
    if how.on == "factors":  # Weights are the root of |w s|, with the sign in A, as in add_weighted_adapter.
        roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
        signed = torch.tensor([math.copysign(math.sqrt(abs(scale)), scale) for scale in scales])
        a = merged([factors.A for _, factors in parts], signed, request)
        return Combined(a, merged([factors.B for _, factors in parts], roots, request))
    if not how.function and all(factors.magnitude is None for _, factors in parts):
        # sum w_i s_i B_i A_i = [B_1 ...] [w_1 s_1 A_1; ...], scaled in the order of PEFT's `cat`.
        a = torch.cat([factors.A * weight * factors.scaling for weight, factors in parts])
        b = torch.cat([factors.B for _, factors in parts], dim=1)
        return Combined(a, b) if how.on == "sum" else truncated(a, b, rank)
    deltas = [f.delta() if f.magnitude is None else adapted_rows(base(), 0, f) - base() for _, f in parts]
    weights = torch.tensor([weight for weight, _ in parts])
    if not how.function:
        return truncated_dense(torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(0), rank)
    return truncated_dense(merged(deltas, weights, request), rank)


def merged(tensors: list[Tensor], weights: Tensor, request: CombineRequest) -> Tensor:
    """Call PEFT's function of the method."""
    from peft.utils import merge_utils

    settings: dict[str, Any] = {}
    if "density" in request.how.options:
        settings["density"] = request.density
    if "majority_sign_method" in request.how.options:
        settings["majority_sign_method"] = request.majority_sign_method or "total"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "density >= 1: no pruning".
        result: Tensor = getattr(merge_utils, request.how.function)(tensors, weights, **settings)
    return result


def truncated(a: Tensor, b: Tensor, rank: int) -> Combined:
    """Return the best LoRA of a rank (Eckart and Young 1936) without forming B A.

    With B = Q_b R_b and A^T = Q_a R_a, the singular values are those of R_b R_a^T (K, K). Takes O(K^2 (O + I)) fp64
    operations.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    energy, dropped = float(s.square().sum()), float(s[rank:].square().sum())
    return balanced(q_b @ u[:, :rank], s[:rank], v[:rank] @ q_a.T, energy, dropped)


def truncated_dense(whole: Tensor, rank: int) -> Combined:
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


def balanced(u: Tensor, s: Tensor, v: Tensor, energy: float, dropped: float) -> Combined:
    """Return U S V with the root of S on each side (PEFT: in B), so that further training has one scale for both."""
    root = s.sqrt()
    return Combined((root[:, None] * v).float(), (u * root).float(), energy, dropped)
