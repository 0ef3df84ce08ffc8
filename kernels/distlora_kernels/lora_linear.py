"""The adapted linear, y = x W^T + s (x A^T) B^T, over a frozen weight that is dense or packed: one autograd function.

Two rules make the same function work under FSDP2, ZeRO-3 and none (README.md):
- it saves the weight's Parameters themselves, never a view or a dequantized copy, and dequantizes again in backward: so
  their storage may be freed after forward and refilled before backward;
- the adapter's term is written first and the base GEMM accumulates into it (beta = 1). Added to an output that is
  already rounded to bf16, an update below half an ulp would vanish.

With dropout it is y = x W^T + s k (d(x) A^T) B^T: d sets the dropped inputs to 0, k makes up for them (dropout.py). The
mask is computed in forward and again in backward, never kept.

Letters: M rows, I in features, O out features, R rank (all adapters of the linear side by side).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels.dropout import Dropout, dropped
from distlora_kernels.nf4 import dequantize_blocks, nf4_dequantize


class FrozenWeight(NamedTuple):
    """A weight (O, I) that gets no gradient.

    `parts` is (weight,), NF4's (codes, scales, group_scale, offset), or (codes, absmax) without double quantization.
    """

    parts: tuple[Tensor, ...]
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`."""
        if len(self.parts) == 1:
            return self.parts[0].to(dtype)
        if len(self.parts) == 2:
            return dequantize_blocks(*self.parts, shape=self.shape, dtype=dtype)
        codes, scales, group_scale, offset = self.parts
        return nf4_dequantize(codes, scales, group_scale, offset, shape=self.shape, dtype=dtype)


class Adapter(NamedTuple):
    """What a linear adds: a (R, I) and b (O, R), fp32 masters, the gate on x A^T, and the inputs that it does not see.

    gate: the scale s, or (M, R) when several adapters stand side by side: s where a row uses the column's adapter, else
    0.
    """

    a: Tensor
    b: Tensor
    gate: Tensor | float
    dropout: Dropout | None = None


def project_down(x: Tensor, downs: list[Tensor]) -> list[Tensor]:
    """X A^T for several adapters of one input, X read once: x (..., I), downs (R_i, I) -> (M, R_i) each, in x's dtype.

    Without gradient: it only saves `lora_linear` the work when its result is passed as `xa`; the gradient is
    lora_linear's.
    """
    with torch.no_grad():
        stacked = torch.cat([down.to(x.dtype) for down in downs]) if len(downs) > 1 else downs[0].to(x.dtype)
        return list((x.flatten(0, -2) @ stacked.T).split([down.shape[0] for down in downs], dim=1))


def lora_linear(
    x: Tensor,
    weight: FrozenWeight,
    adapter: Adapter | None = None,
    *,
    bias: Tensor | None = None,
    xa: Tensor | None = None,
) -> Tensor:
    """x (..., I) -> (..., O) in x's dtype; gradients for x, a and b, never for the weight or the bias.

    adapter=None is the base alone. `xa` is project_down's result for this adapter, if the caller has it; with dropout
    there is none, as each linear sees an input of its own. GEMMs run in x's dtype with fp32 accumulation; the adapter's
    gradients are widened to its masters' fp32 after their GEMM.
    """
    a, b, gate, dropout = adapter if adapter is not None else (None, None, 0.0, None)
    assert xa is None or dropout is None, "x A^T of the whole input was given to an adapter with dropout"
    if dropout is not None:
        gate = gate * dropout.scale
    y = _LoRALinear.apply(x.flatten(0, -2), a, b, gate, dropout, bias, xa, weight.shape, *weight.parts)
    return y.unflatten(0, x.shape[:-1])


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        gate: Tensor | float,
        dropout: Dropout | None,
        bias: Tensor | None,
        xa: Tensor | None,
        shape: tuple[int, int],
        *parts: Tensor,
    ) -> Tensor:
        weight = FrozenWeight(parts, shape).dense(x.dtype)
        gated = None
        if a is None or b is None:
            y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        else:
            if xa is None:
                xa = _seen(x, dropout) @ a.to(x.dtype).T
            gated = (xa * gate).to(x.dtype)
            up = b.to(x.dtype).T
            delta = gated @ up if bias is None else torch.addmm(bias, gated, up)
            y = torch.addmm(delta, x, weight.T, out=delta)
        ctx.shape, ctx.num_parts, ctx.dropout = shape, len(parts), dropout
        ctx.gate = gate if isinstance(gate, float) else None
        # Only what backward reads: x for dA, gated for dB.
        ctx.save_for_backward(*parts, None if a is None else x, gated, a, b, None if ctx.gate is not None else gate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *parts, x, gated, a, b, gate = ctx.saved_tensors
        needs_dx, needs_da, needs_db = ctx.needs_input_grad[:3]
        dx = da = db = None
        if a is not None:
            dxa = ((dy @ b.to(dy.dtype)) * (ctx.gate if gate is None else gate)).to(dy.dtype)
            db = (dy.T @ gated).to(b.dtype) if needs_db else None
            mask = None if ctx.dropout is None else dropped(ctx.dropout, *x.shape)
            da = (dxa.T @ _zeroed(x, mask)).to(a.dtype) if needs_da else None
        if needs_dx:
            weight = FrozenWeight(tuple(parts), ctx.shape).dense(dy.dtype)
            if a is None:
                dx = dy @ weight
            else:
                dx = _zeroed(dxa @ a.to(dy.dtype), mask)
                dx = torch.addmm(dx, dy, weight, out=dx)
        return (dx, da, db, None, None, None, None, None, *(None for _ in range(ctx.num_parts)))


def _seen(x: Tensor, dropout: Dropout | None) -> Tensor:
    """What the adapter sees of x (M, I)."""
    return _zeroed(x, None if dropout is None else dropped(dropout, *x.shape))


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(mask, 0)
