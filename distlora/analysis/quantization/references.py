"""Weights of known distributions through the same formats: what a tensor's own figures are read against.

NF4's levels are quantiles of a normal distribution (QLoRA, arXiv 2305.14314, section 3), so it must win on normal
weights; int4's are evenly spaced, so it must win on uniform ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distlora.analysis.quantization.roundtrip import CHUNK, Sums, measure

SIZE = 2 * CHUNK
"""Two million weights: the figures are good to three digits."""


def _laplace(generator: torch.Generator) -> Tensor:
    uniform = torch.rand(SIZE, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "uniform": lambda generator: torch.rand(SIZE, generator=generator) * 2 - 1,
    "normal": lambda generator: torch.randn(SIZE, generator=generator),
    "Laplace": _laplace,
}
"""Excess kurtosis -1.2, 0 and 3. Their scale does not matter: each block is divided by its absmax."""


def measure_references() -> dict[str, Sums]:
    """The sums of each distribution; the same numbers on every machine of a kind (one seed)."""
    found = {}
    for name, draw in DISTRIBUTIONS.items():
        weights = draw(torch.Generator().manual_seed(0))
        found[name] = measure(lambda weights=weights: iter(weights.split(CHUNK)), SIZE)  # type: ignore[misc]
    return found
