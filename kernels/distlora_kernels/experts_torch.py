"""Run expert linears one expert after the other in torch operations: the path of the CPU, and of every dtype.

Of a quantized weight one expert is dequantized at a time, with the rest of its first and last group; experts without
rows are not dequantized.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distlora_kernels.operands import ExpertChoice, ExpertGradients, ExpertLinear, Routing
from distlora_kernels.products import product


def forward(x: Tensor, linear: ExpertLinear, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Return y (S, O) of x (S, I), and s x A^T (S, R) for backward; None without an adapter.

    R is the largest rank if tokens choose. An expert's dense weight is freed before the next.
    """
    weight_of = dense_experts(linear, x.dtype)
    y, adapter = x.new_empty(x.shape[0], linear.out_features), linear.adapter
    gated = None
    if adapter is not None:
        a, b = _in_dtype(linear, x.dtype)
        widest = max(adapter.scale.ranks) if isinstance(adapter.scale, ExpertChoice) else a.shape[1]
        gated = x.new_empty(x.shape[0], widest)
    for expert, rows in routing.spans():
        x_e, y_e = x[rows], y[rows]
        if adapter is None or gated is None:
            product(x_e, weight_of(expert).T, out=y_e)
        else:
            for run, columns, scale in adapter.runs(routing, expert, rows):
                if columns is None:
                    y[run] = 0
                    continue
                xa = product(x[run], _of(a, expert)[columns].T) * scale
                gated[run, : xa.shape[1]] = xa
                product(xa, _of(b, expert)[:, columns].T, out=y[run])
            product(x_e, weight_of(expert).T, add=y_e, out=y_e)
        if linear.bias is not None:
            y_e += linear.bias[expert]
    return y, gated


def backward(
    x: Tensor | None,
    linear: ExpertLinear,
    routing: Routing,
    gated: Tensor | None,
    dy: Tensor,
    needs: tuple[bool, bool, bool],
) -> ExpertGradients:
    """Return the gradients of <y, dy> for x (S, I), a (E, R, I) and b (E, O, R) that are needed."""
    weight_of = dense_experts(linear, dy.dtype)
    in_features, adapter = linear.weight.shape[1 if linear.transposed else 2], linear.adapter
    dx = dy.new_empty(dy.shape[0], in_features) if needs[0] else None
    da = db = None
    if adapter is not None:
        a, b = _in_dtype(linear, dy.dtype)
        da = torch.zeros_like(adapter.a) if needs[1] else None
        db = torch.zeros_like(adapter.b) if needs[2] else None
    for expert, rows in routing.spans():
        if adapter is None:
            if dx is not None:
                product(dy[rows], weight_of(expert), out=dx[rows])
            continue
        assert x is not None
        assert gated is not None
        for run, columns, scale in adapter.runs(routing, expert, rows):
            if columns is None:
                if dx is not None:
                    dx[run] = 0
                continue
            dy_run, run_a = dy[run], _of(a, expert)[columns]
            dxa = (product(dy_run, _of(b, expert)[:, columns]) * scale).to(dy.dtype)
            if db is not None:
                _put(db, expert, (slice(None), columns), product(dy_run.T, gated[run, : len(run_a)]))
            if da is not None:
                _put(da, expert, (columns,), product(dxa.T, x[run]))
            if dx is not None:
                product(dxa, run_a, out=dx[run])
        if dx is not None:
            product(dy[rows], weight_of(expert), add=dx[rows], out=dx[rows])
    return ExpertGradients(dx, da, db)


def dense_experts(linear: ExpertLinear, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """Return a function from an expert to its weight (O, I) in `dtype`."""
    weight, transposed = linear.weight, linear.transposed

    def weight_of(expert: int) -> Tensor:
        if weight.format is None:
            dense = weight.parts[0][expert].to(dtype)
        else:
            dense = weight.format.slice(weight.parts, weight.shape, expert, dtype)
        return dense.T if transposed else dense

    return weight_of


def _of(factors: Tensor, expert: int) -> Tensor:
    """Return an expert's factor of (E, ...), or of (1, ...) the one that all share."""
    return factors[expert % len(factors)]


def _put(gradients: Tensor, expert: int, place: tuple[slice, ...], gradient: Tensor) -> None:
    """Write an expert's gradient; of a shared factor, add it to the others'."""
    target = _of(gradients, expert)[place]
    if len(gradients) == 1:
        target += gradient
    else:
        target.copy_(gradient)


def _in_dtype(linear: ExpertLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a and b in `dtype`, contiguous per expert: PEFT's layout has the experts of B innermost."""
    assert linear.adapter is not None
    return linear.adapter.a.to(dtype).contiguous(), linear.adapter.b.to(dtype).contiguous()
