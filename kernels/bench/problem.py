"""The operands of one group of linears, the same for every candidate, and what right outputs are.

Letters: M rows, I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.nf4 import nf4_quantize
from distlora_kernels.operands import Adapter, FrozenWeight, Linear

SCALE = 2.0
"""A power of two: rounding s B and rounding B are the same."""
_WEIGHT_DEVIATION, _UP_DEVIATION = 0.02, 0.05
"""Of W and B: an adapter that is left out moves outputs by some 10 %, far beyond what a check allows."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What stays the same for every M."""

    linears: tuple[Linear, ...]
    dense: tuple[Tensor, ...]
    """(O, I) bf16 of each, dequantized by the reference."""

    @property
    def masters(self) -> list[Tensor]:
        """a and b of each linear, in turn."""
        adapters = [cast(Adapter, linear.adapter) for linear in self.linears]
        return [master for adapter in adapters for master in (adapter.a, adapter.b)]


def make_weights(shapes: Sequence[tuple[int, int]], rank: int, device: torch.device, *, seed: int = 0) -> Weights:
    """Gaussian weights in NF4, with adapters whose fp32 masters are bf16 numbers, so that all have equal operands."""
    generator = torch.Generator(device).manual_seed(seed)
    linears, dense = [], []
    for out, features in shapes:
        weight = normal((out, features), device, generator).mul_(_WEIGHT_DEVIATION)
        parts = nf4_quantize(weight)
        del weight
        a = normal((rank, features), device, generator).mul_(features**-0.5).float().requires_grad_()
        b = normal((out, rank), device, generator).mul_(_UP_DEVIATION).float().requires_grad_()
        linears.append(Linear(FrozenWeight(parts, (out, features)), Adapter(a, b, SCALE)))
        dense.append(reference.nf4_dequantize(*parts, shape=(out, features), dtype=torch.bfloat16))
    return Weights(tuple(linears), tuple(dense))


def normal(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """bf16."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a group and the gradients of its outputs: x (M, I), dys (M, O), bf16."""

    x: Tensor
    dys: tuple[Tensor, ...]


def make_batch(shapes: Sequence[tuple[int, int]], num_rows: int, device: torch.device, *, seed: int = 1) -> Batch:
    generator = torch.Generator(device).manual_seed(seed)
    x = normal((num_rows, shapes[0][1]), device, generator).requires_grad_()
    return Batch(x, tuple(normal((num_rows, out), device, generator) for out, _ in shapes))


@torch.no_grad()
def expected_outputs(weights: Weights, batch: Batch, *, adapted: bool) -> dict[str, Tensor]:
    """y0..., dx, and with `adapted` da0, db0...: fp32 throughout, from the bf16 operands.

    y = x W^T + s (x A^T) B^T;  dX = sum of dY W + s (dY B) A;  dA = s (dY B)^T X;  dB = s dY^T (X A^T).
    """
    x = batch.x.float()
    dx = torch.zeros_like(x)
    outputs: dict[str, Tensor] = {}
    for index, (dense, linear, grad) in enumerate(zip(weights.dense, weights.linears, batch.dys, strict=True)):
        weight, dy = dense.float(), grad.float()
        y = x @ weight.T
        dx.addmm_(dy, weight)
        if adapted:
            adapter = cast(Adapter, linear.adapter)
            xa, dxa = SCALE * (x @ adapter.a.T), SCALE * (dy @ adapter.b)
            y.addmm_(xa, adapter.b.T)
            dx.addmm_(dxa, adapter.a)
            outputs |= {f"da{index}": dxa.T @ x, f"db{index}": dy.T @ xa}
        outputs[f"y{index}"] = y
    return outputs | {"dx": dx}
