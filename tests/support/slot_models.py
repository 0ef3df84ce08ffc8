"""Models whose rows choose trials."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def filled(parameters: Mapping[str, nn.Parameter], seed: int) -> None:
    """B as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if name.endswith(".B"):
            parameter.data.normal_(0, 0.05, generator=generator)
        elif name.endswith("magnitude"):
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def labels_of(rows: Tensor) -> Tensor:
    return rows.roll(-1, dims=1)
