"""The gate of an adapted linear's GPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.lora_linear import RowChoice


def gate_of(choice: RowChoice, num_rows: int) -> Tensor:
    """Return (M, R) fp64: s where the row uses the column's adapter, else 0."""
    device = choice.rows.device
    owners = torch.tensor([n for n, rank in enumerate(choice.ranks) for _ in range(rank)], device=device)
    scales = torch.tensor(choice.scales, dtype=torch.float64, device=device)[owners]
    gate = torch.where(choice.rows[:, None] == owners, scales, 0.0)
    return gate.repeat_interleave(num_rows // len(choice.rows), dim=0)
