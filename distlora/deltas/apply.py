"""A weight with what an adapter adds to it, by rows.

LoRA (Hu et al. 2021, arXiv 2106.09685): W + s B A. DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5):
m (W + s B A) / ||W + s B A||, the norm of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora.deltas.factors import Factors


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
