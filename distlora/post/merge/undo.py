"""What a merged weight was before, but for the rounding: the same bits on every machine.

W ~ M / k - s B A, with DoRA's k (O,), the norm that each row got over the one it had. Products of matrices add up in an
order that depends on the library and the processor; here one rank after the other is taken away, each product and each
difference rounded on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.post.deltas.factors import Factors


@dataclass(frozen=True, kw_only=True, slots=True)
class Undo:
    """Of one weight."""

    factors: Factors | None = None
    """On the base as it is on disk; None where nothing was added to it."""
    transposed: bool = False
    """Whether each expert's weight lies as (in, out)."""
    scale: Tensor | None = None
    """(O,) fp32: k, of DoRA."""

    @torch.no_grad()
    def rows(self, merged: Tensor, first: int) -> Tensor:
        """Rows `first` and on, (n, columns) fp32; new memory."""
        if self.factors is None:
            return merged.clone()
        if self.scale is not None:
            scale = self.scale[first : first + len(merged), None]
            merged = torch.where(scale > 0, merged / scale, 0.0)
        else:
            merged = merged.clone()
        A, B = self.factors.A, self.factors.B * self.factors.scaling
        if A.dim() == 2:
            _take(merged, B[first : first + len(merged)], A)
            return merged
        per_expert = A.shape[2] if self.transposed else B.shape[1]
        done = 0
        while done < len(merged):
            expert, inside = divmod(first + done, per_expert)
            count = min(per_expert - inside, len(merged) - done)
            left, right = (A[expert].T, B[expert].T) if self.transposed else (B[expert], A[expert])
            _take(merged[done : done + count], left[inside : inside + count], right)
            done += count
        return merged


def _take(rows: Tensor, left: Tensor, right: Tensor) -> None:
    """rows -= left right, in place: (n, I), (n, R), (R, I)."""
    product = torch.empty_like(rows)
    for rank in range(right.shape[0]):
        torch.mul(left[:, rank : rank + 1], right[rank], out=product)
        rows.sub_(product)


@torch.no_grad()
def dora_scale(base: Tensor, first: int, factors: Factors) -> Tensor:
    """k of some rows of the base, (n, I) fp32 -> (n,)."""
    assert factors.magnitude is not None
    own = slice(first, first + len(base))
    norms = torch.linalg.vector_norm(torch.addmm(base, factors.B[own], factors.A, alpha=factors.scaling), dim=1)
    return torch.where(norms > 0, factors.magnitude[own] / norms, 0.0)
