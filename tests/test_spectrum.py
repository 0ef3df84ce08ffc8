"""`distlora analyze spectrum`: against dense SVDs, constructed intruders, every kind of run, the command."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.analysis.spectrum import decomposed, intruders
from distlora.analysis.spectrum.changes import Change
from distlora.analysis.spectrum.request import Request
from distlora.deltas.factors import Factors
from distlora.trained import Name

TIGHT = 1e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)).Q


def with_values(out_features: int, in_features: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(U, U S V^T in fp32)."""
    left, right = orthonormal(out_features, len(values), seed), orthonormal(in_features, len(values), seed + 1)
    return left, ((left * values) @ right.T).float()


def request(**values: Any) -> Request:
    return Request(first=Name(place="run"), first_name="run", out="out", **values)


def change(before: Tensor, after: Tensor, factors: Factors | None = None) -> Change:
    return Change(
        name="model.layers.0.mlp.up_proj.weight",
        layer=0,
        linear="mlp.up_proj",
        before=before,
        after=after,
        factors=factors,
    )


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (64, 64)])
@pytest.mark.parametrize("method", ["factors", "whole", "krylov"])
def test_singular_values_and_vectors_are_those_of_a_dense_svd(shape: tuple[int, int], method: str) -> None:
    """Values to 1e-5 of the largest, vectors to 1e-5 of their length."""
    rows, columns = shape
    if method == "factors":
        a, b = torch.randn(8, columns, generator=generator(1)), torch.randn(rows, 8, generator=generator(2))
        matrix, triples = 0.3 * b.double() @ a.double(), decomposed.of_factors(a, b, 0.3)
    else:
        matrix = torch.randn(rows, columns, generator=generator(3))
        triples = decomposed.whole(matrix) if method == "whole" else decomposed.largest(matrix, 8)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = 8 if method != "whole" else len(values)
    assert (triples.values[:count] - values[:count]).abs().max() < TIGHT * values[0]
    for mine, theirs in ((triples.left, left), (triples.right, right.T)):
        off = mine[:, :count] - theirs[:, :count] * (mine[:, :count] * theirs[:, :count]).sum(dim=0)
        assert torch.linalg.vector_norm(off, dim=0).max() < max(TIGHT, float(triples.errors[:count].max()))
    if method == "whole":
        assert (decomposed.values_of(matrix) - values).abs().max() < TIGHT * values[0]


def intruding(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(W, W'): W' has three singular vectors, its 1st, 2nd and 4th, that are orthogonal to nearly all of W's, one (the
    6th) that is 0.6 of a small one of W's, and else W's own."""
    size = min(shape)
    values = 3 * torch.exp(-0.04 * torch.arange(size, dtype=torch.float64)) + 0.05
    left, base = with_values(*shape, values)
    outputs = torch.linalg.qr(
        torch.cat([left[:, :20], torch.randn(shape[0], 4, generator=generator(9), dtype=torch.float64)], dim=1)
    ).Q[:, 20:]
    inputs = torch.linalg.svd(base.double())[2][-4:].T if shape[1] > shape[0] else orthonormal(shape[1], 4, 7)
    mixed = 0.6 * left[:, 60] + 0.8 * outputs[:, 3]
    outputs[:, 3] = mixed / mixed.norm()
    strengths = torch.tensor([5.0, 4.0, 2.95, 2.75], dtype=torch.float64)
    return base, base + ((outputs * strengths) @ inputs.T).float()


@pytest.mark.parametrize("shape", [(90, 150), (150, 90)])
def test_intruders_are_those_of_every_cosine_and_bounds_decide_them(shape: tuple[int, int]) -> None:
    base, after = intruding(shape)
    thresholds = (0.3, 0.5, 0.7)
    all_of_base = torch.linalg.svd(base.double(), full_matrices=False)[0]
    first = torch.linalg.svd(after.double(), full_matrices=False)[0][:, :10]
    cosines = (all_of_base.T @ first).abs().max(dim=0).values
    exact, _, _ = intruders.similarity(base, after, 10, thresholds, exact_up_to=200)
    assert (exact.lower - cosines).abs().max() < TIGHT
    for threshold in thresholds:
        assert exact.counts(threshold) == (int((cosines < threshold).sum()), 0)
    bounds, _, _ = intruders.similarity(base, after, 10, (0.5, 0.7), exact_up_to=0)
    assert bool((bounds.lower <= cosines + 1e-9).all())
    assert bool((bounds.upper >= cosines - 1e-9).all())
    for threshold in (0.5, 0.7):
        assert bounds.counts(threshold) == exact.counts(threshold)
