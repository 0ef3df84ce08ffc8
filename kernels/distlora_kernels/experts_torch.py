"""Expert linears one expert after the other, in torch operations: the path of the CPU, and of every dtype.

Of a packed weight one expert is dequantized at a time, where its slice begins and ends with a block of 64 weights (with
a group of 16,384 on a GPU): 1/E of the fused weight is dense then, and experts without rows are left packed. Else the
whole fused weight is, once a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distlora_kernels import nf4
from distlora_kernels.expert_operands import ExpertGradients, ExpertLinear, Routing
from distlora_kernels.operands import FrozenWeight
from distlora_kernels.scratch import DenseWeights


def forward(x: Tensor, linear: ExpertLinear, routing: Routing, weights: DenseWeights) -> tuple[Tensor, Tensor | None]:
    """x (S, I) -> y (S, O), and what the backward keeps: s x A^T (S, R), None without an adapter. No dense weight is
    left in `weights`: an expert's is dropped before the next one's is made.
    """
    weight_of = dense_experts(linear, x.dtype)
    y = x.new_empty(x.shape[0], linear.out_features)
    gated = None
    if linear.adapter is not None:
        a, b = _in_dtype(linear, x.dtype)
        gated = x.new_empty(x.shape[0], a.shape[1])
    for expert, rows in routing.spans():
        x_e, y_e = x[rows], y[rows]
        if linear.adapter is None or gated is None:
            torch.mm(x_e, weight_of(expert).T, out=y_e)
        else:
            gated[rows] = (x_e @ a[expert].T) * linear.adapter.gate_of(rows)
            torch.mm(gated[rows], b[expert].T, out=y_e)
            torch.addmm(y_e, x_e, weight_of(expert).T, out=y_e)
        if linear.bias is not None:
            y_e += linear.bias[expert]
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
    weight_of = dense_experts(linear, dy.dtype)
    in_features = linear.weight.shape[1 if linear.transposed else 2]
    dx = dy.new_empty(dy.shape[0], in_features) if needs[0] else None
    da = db = None
    if linear.adapter is not None:
        a, b = _in_dtype(linear, dy.dtype)
        da = torch.zeros_like(linear.adapter.a) if needs[1] else None
        db = torch.zeros_like(linear.adapter.b) if needs[2] else None
    for expert, rows in routing.spans():
        dy_e, dxa = dy[rows], None
        if linear.adapter is not None:
            assert x is not None
            assert gated is not None
            dxa = ((dy_e @ b[expert]) * linear.adapter.gate_of(rows)).to(dy.dtype)
            if db is not None:
                db[expert] = dy_e.T @ gated[rows]
            if da is not None:
                da[expert] = dxa.T @ x[rows]
        if dx is not None and dxa is None:
            torch.mm(dy_e, weight_of(expert), out=dx[rows])
        elif dx is not None and dxa is not None:
            torch.mm(dxa, a[expert], out=dx[rows])
            torch.addmm(dx[rows], dy_e, weight_of(expert), out=dx[rows])
    return ExpertGradients(dx, da, db)


def dense_experts(linear: ExpertLinear, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """expert -> its weight (O, I) in `dtype`."""
    weight, transposed = linear.weight, linear.transposed
    whole = None
    if not weight.packed:
        whole = weight.parts[0]
    elif not _is_cut_between_experts(weight):
        whole = weight.dense(dtype)

    def weight_of(expert: int) -> Tensor:
        own = whole[expert].to(dtype) if whole is not None else _dequantize(weight, expert, dtype)
        return own.T if transposed else own

    return weight_of


def _is_cut_between_experts(weight: FrozenWeight) -> bool:
    numel = math.prod(weight.shape[1:])
    return numel % (nf4.GROUP if weight.parts[0].is_cuda else nf4.BLOCK) == 0


def _dequantize(weight: FrozenWeight, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's slice of a packed weight, by itself; the bits are those of the whole weight's."""
    codes, scales, group_scale, offset = weight.parts
    shape = weight.shape[1:]
    numel = math.prod(shape)
    start = expert * numel
    if numel % nf4.GROUP == 0:
        groups = slice(start // nf4.GROUP, (start + numel) // nf4.GROUP)
        return nf4.nf4_dequantize(codes[groups], scales[groups], group_scale[groups], offset, shape=shape, dtype=dtype)
    return nf4.dequantize_slice(codes, scales, group_scale, offset, start=start, shape=shape, dtype=dtype)


def _in_dtype(linear: ExpertLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (E, R, I) and b (E, O, R), each expert's contiguous: PEFT's layout has the experts of B innermost."""
    assert linear.adapter is not None
    return linear.adapter.a.to(dtype).contiguous(), linear.adapter.b.to(dtype).contiguous()
