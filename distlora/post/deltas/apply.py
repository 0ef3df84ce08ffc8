"""A weight with what an adapter adds to it, by rows.

LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A. DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5):
m (W + s B A) / ||W + s B A||, the norm of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora.post.deltas.factors import Factors


@torch.no_grad()
def adapted_rows(rows: Tensor, first: int, factors: Factors) -> Tensor:
    """Rows `first` and on of a linear's weight (n, I) fp32, with what `factors` adds to them; new memory."""
    own = slice(first, first + len(rows))
    adapted = torch.addmm(rows, factors.B[own], factors.A, alpha=factors.scaling)
    if factors.magnitude is not None:
        norms = torch.linalg.vector_norm(adapted, dim=1)
        # A row of zeros stays one, as in training.
        adapted *= torch.where(norms > 0, factors.magnitude[own] / norms, 0.0)[:, None]
    return adapted


@torch.no_grad()
def adapted_expert_rows(rows: Tensor, first: int, factors: Factors, *, transposed: bool) -> Tensor:
    """The same of a fused weight of experts, (E x n, columns), which may begin and end inside an expert; `transposed`:
    each expert's weight lies as (I, O)."""
    adapted, done = torch.empty_like(rows), 0
    per_expert = factors.A.shape[2] if transposed else factors.B.shape[1]
    while done < len(rows):
        expert, inside = divmod(first + done, per_expert)
        count = min(per_expert - inside, len(rows) - done)
        left, right = factors.B[expert], factors.A[expert]
        if transposed:
            left, right = right.T, left.T
        own = slice(inside, inside + count)
        part = slice(done, done + count)
        torch.addmm(rows[part], left[own], right, alpha=factors.scaling, out=adapted[part])
        done += count
    return adapted
