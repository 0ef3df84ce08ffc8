"""Expert linears as grouped products (torch.nn.functional.grouped_mm): the path of GPUs in 16 bits.

Nothing is read on the host, so the fused weight is dequantized whole, whichever experts have rows: into the scratch
that every linear's weight takes (scratch.py). grouped_mm has no accumulation into its output, so the adapter's term is
added to the rounded product of the base, as PEFT adds it to a linear's output. Ranks are padded to a multiple of 8: its
rows must be 16 bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels.expert_operands import ExpertAdapter, ExpertGradients, ExpertLinear, Routing
from distlora_kernels.scratch import DenseWeights

_RANK_MULTIPLE = 8


def forward(x: Tensor, linear: ExpertLinear, routing: Routing, weights: DenseWeights) -> tuple[Tensor, Tensor | None]:
    """x (S, I) -> y (S, O), and what the backward keeps: s x A^T (S, R padded), None without an adapter."""
    y = _product(x, _dense(linear, x.dtype, weights).transpose(-2, -1), routing)
    gated = None
    if linear.adapter is not None:
        a, b = _padded(linear.adapter, x.dtype)
        gated = _gated(_product(x, a.transpose(-2, -1), routing), linear.adapter)
        y += _product(gated, b.transpose(-2, -1), routing)
    if linear.bias is not None:
        y += linear.bias[routing.experts]
    return y, gated


def backward(
    x: Tensor | None,
    linear: ExpertLinear,
    routing: Routing,
    weights: DenseWeights,
    gated: Tensor | None,
    dy: Tensor,
    needs: tuple[bool, bool, bool],
) -> ExpertGradients:
    """The gradients of <y, dy> for x (S, I), a (E, R, I) and b (E, O, R), as `needs` asks for them."""
    dx = _product(dy, _dense(linear, dy.dtype, weights), routing) if needs[0] else None
    if linear.adapter is None:
        return ExpertGradients(dx, None, None)
    assert x is not None
    assert gated is not None
    a, b = _padded(linear.adapter, dy.dtype)
    dxa = _gated(_product(dy, b, routing), linear.adapter)
    rank = linear.adapter.a.shape[1]
    da = db = None
    if needs[1]:
        da = _sums(dxa.T, x, routing)[:, :rank].to(linear.adapter.a.dtype)
    if needs[2]:
        db = _sums(dy.T, gated, routing)[:, :, :rank].to(linear.adapter.b.dtype)
    if dx is not None:
        dx += _product(dxa, a, routing)
    return ExpertGradients(dx, da, db)


def _product(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """left (S, P), right (E, P, Q) -> (S, Q), each row with its expert's matrix."""
    return F.grouped_mm(left, right, offs=routing.ends)


def _sums(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """left (P, S), right (S, Q) -> (E, P, Q), each expert's sum over its rows."""
    sums = F.grouped_mm(left, right, offs=routing.ends)
    # Of an expert without rows CUTLASS leaves on sm_100 what the accumulator held (pytorch issue 172439).
    idle = torch.diff(routing.ends, prepend=routing.ends.new_zeros(1)) == 0
    return sums.masked_fill_(idle[:, None, None], 0.0)


def _dense(linear: ExpertLinear, dtype: torch.dtype, weights: DenseWeights) -> Tensor:
    """(E, O, I) in `dtype`; on a GPU until the next weight is taken."""
    weight = weights.take(0, linear.weight, dtype)
    return weight.transpose(-2, -1) if linear.transposed else weight


def _padded(adapter: ExpertAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (E, R, I) and b (E, O, R) in `dtype`, R filled up with zeros."""
    missing = -adapter.a.shape[1] % _RANK_MULTIPLE
    a = F.pad(adapter.a.to(dtype), (0, 0, 0, missing))
    b = F.pad(adapter.b.to(dtype), (0, missing))
    return a.contiguous(), b.contiguous()


def _gated(xa: Tensor, adapter: ExpertAdapter) -> Tensor:
    """(S, R padded) times the gate, in its own dtype."""
    gate = adapter.gate
    if isinstance(gate, Tensor):
        gate = F.pad(gate, (0, xa.shape[1] - gate.shape[1]))
    return (xa * gate).to(xa.dtype)
