"""Whether an output is right, before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_TILE = 64
FORWARD_ULPS, GRADIENT_ULPS = 2.0, 4.0
"""Machine epsilons of bf16 that the worst tile may be off: outputs, gradients."""


def worst_tile_error(actual: Tensor, expected: Tensor) -> float:
    """Largest ||actual - expected|| of any tile of 64 x 64, over what a tile of `expected` has on average, in epsilons
    of bf16. One wrong tile shows, however large the matrix. NaN stays NaN.

    Raises ValueError where the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error = (actual.detach().float() - expected.float()).square_()
    rows, columns = min(_TILE, error.shape[0]), min(_TILE, error.shape[1])
    padding = (0, -error.shape[1] % columns, 0, -error.shape[0] % rows)
    if any(padding):
        error = torch.nn.functional.pad(error, padding)
    tiles = error.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum(dim=(1, 3))
    scale = expected.float().square().mean() * (rows * columns)
    return float((tiles.max() / scale).sqrt()) / torch.finfo(torch.bfloat16).eps


def check(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, slack: float = 1.0) -> tuple[float, str]:
    """-> the worst error in epsilons of bf16, and what is wrong, "" if nothing is. `slack` multiplies the limits."""
    if actual.keys() != expected.keys():
        return float("nan"), f"gives {sorted(actual)}, expected {sorted(expected)}"
    worst, faults = 0.0, []
    for name, value in expected.items():
        error = worst_tile_error(actual[name], value)
        limit = slack * (GRADIENT_ULPS if name.startswith("d") else FORWARD_ULPS)
        if not error <= limit:
            faults.append(f"{name} is {error:.2g} ulps off (at most {limit:g})")
        worst = error if error != error else max(worst, error)
    return worst, "; ".join(faults)
