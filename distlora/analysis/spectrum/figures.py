"""A matrix before and after training -> its entry in spectrum.json; and sums over layers and linears.

With p_i = s_i / sum s: effective rank exp(-sum p_i ln p_i) (Roy and Vetterli 2007), stable rank ||dW||_F^2 / s_1^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distlora.analysis.spectrum.changes import Change
from distlora.analysis.spectrum.decomposed import Singular, largest, of_factors, whole
from distlora.analysis.spectrum.intruders import Similarity, similarity
from distlora.analysis.spectrum.request import SpectrumRequest
from distlora.weights.decompose import times, transposed_times

MOST_VALUES = 512
"""Singular values of one dW in the JSON."""
NO_RANK = 1e-6
"""Share of the largest singular value of s B A below which others are fp32 rounding."""


@torch.no_grad()
def measure(change: Change, request: SpectrumRequest) -> tuple[dict[str, Any], Singular]:
    """Return the figures of one matrix and dW's singular triples (of a large dense dW the first `top`)."""
    delta, is_whole, norm = of_delta(change, request)
    found, before, after = similarity(
        change.before, change.after, request.top, request.thresholds, exact_up_to=request.exact_up_to
    )
    norm_before = float(torch.linalg.vector_norm(change.before, dtype=torch.float64))
    largest_value = float(delta.values[0]) if len(delta.values) else 0.0
    figures = {
        "name": change.name,
        "layer": change.layer,
        "linear": change.linear,
        "shape": list(change.before.shape),
        "whole": min(change.before.shape) <= request.exact_up_to,
        "before": {"norm": norm_before, "values": _listed(before.values[: request.top])},
        "after": {"values": _listed(after.values)},
        "delta": {
            "rank": int((delta.values > NO_RANK * largest_value).sum()) if is_whole else None,
            "norm": norm,
            "relative_norm": norm / norm_before if norm_before else None,
            "relative_spectral_norm": largest_value / float(before.values[0]) if len(before.values) else None,
            "stable_rank": (norm / largest_value) ** 2 if largest_value else None,
            "effective_rank": effective_rank(delta.values) if is_whole and largest_value else None,
            "values": _listed(delta.values[:MOST_VALUES]),
        },
        "intruders": of_similarity(found, request.thresholds),
    }
    return figures, delta


def of_delta(change: Change, request: SpectrumRequest) -> tuple[Singular, bool, float]:
    """(dW's triples, whether these are all, ||dW||_F)."""
    if change.factors is not None:
        triples = of_factors(change.factors.A, change.factors.B, change.factors.scaling)
        return triples, True, float(torch.linalg.vector_norm(triples.values))
    dense = change.delta()
    norm = float(torch.linalg.vector_norm(dense, dtype=torch.float64))
    if norm == 0:
        nothing = torch.zeros(0, dtype=torch.float64, device=dense.device)
        return Singular(dense[:, :0].double(), nothing, dense.T[:, :0].double(), nothing), True, 0.0
    if min(dense.shape) <= request.exact_up_to:
        return whole(dense), True, norm
    return largest(dense, request.top).first(request.top), False, norm


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of the normalized singular values."""
    shares = values[values > 0] / values.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def of_similarity(found: Similarity, thresholds: Sequence[float]) -> dict[str, Any]:
    """Return the cosines, the nearest vectors and the counts of intruders for each threshold."""
    counts = {f"{threshold:g}": found.counts(threshold) for threshold in thresholds}
    return {
        "cosines": [[float(low), float(high)] for low, high in zip(found.lower, found.upper, strict=True)],
        "nearest": found.own.tolist(),
        "counts": {key: {"intruders": certain, "undecided": open_} for key, (certain, open_) in counts.items()},
    }


def angles(first: Singular, second: Singular, rank: int, norm: float, dense_OI: Tensor | None) -> dict[str, Any]:
    """Return the cosines of the principal angles between two dW (Bjorck and Golub 1973).

    The spaces are those of the first `rank` singular vectors. Also returns what two random spaces of these sizes
    share, and how much of the second's energy lies in the first's spaces. `norm` is that of the whole second dW, which
    is `dense_OI` where `second` holds the first of its triples alone.
    """
    sides = {}
    for side in ("left", "right"):
        mine, theirs = getattr(first, side)[:, :rank], getattr(second, side)
        cosines = torch.linalg.svdvals(mine.T @ theirs[:, :rank])
        if dense_OI is None:
            inside = (mine.T @ theirs) * second.values
        else:
            inside = times(dense_OI, mine) if side == "right" else transposed_times(dense_OI, mine)
        sides[side] = {
            "cosines": _listed(cosines.clamp_max(1)),
            "shared": float(cosines.square().mean()),
            "by_chance": min(1.0, cosines.shape[0] / len(mine)),
            "energy": float(inside.square().sum()) / norm**2,
        }
    return {"rank": rank, **sides}


def grouped(weights: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """Return sums over the weights of each group."""
    total = sum(weight["delta"]["norm"] ** 2 for weight in weights)
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for weight in weights:
        groups.setdefault(key(weight), []).append(weight)
    return {str(name): summed(members, total) for name, members in groups.items()}


def summed(weights: Sequence[Mapping[str, Any]], total: float | None = None) -> dict[str, Any]:
    """One line of a table. `total`: the energy that a share is of."""
    energy = sum(weight["delta"]["norm"] ** 2 for weight in weights)
    before = sum(weight["before"]["norm"] ** 2 for weight in weights)
    keys = weights[0]["intruders"]["counts"].keys()
    return {
        "weights": len(weights),
        "energy_share": None if not total else energy / total,
        "relative_norm": math.sqrt(energy / before) if before else None,
        "effective_rank": _mean([weight["delta"]["effective_rank"] for weight in weights]),
        "stable_rank": _mean([weight["delta"]["stable_rank"] for weight in weights]),
        "vectors": sum(len(weight["intruders"]["cosines"]) for weight in weights),
        "counts": {
            key: {
                what: sum(weight["intruders"]["counts"][key][what] for weight in weights)
                for what in ("intruders", "undecided")
            }
            for key in keys
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _listed(values: Tensor) -> list[float]:
    return [float(value) for value in values]
