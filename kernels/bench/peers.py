"""Run the linears of one input as PEFT and Unsloth do, as sequences in plain torch.

The sequences were written after reading the code (2026-11): peft/tuners/lora/bnb.py over bitsandbytes' MatMul4Bit, and
unsloth/kernels/fast_lora.py. Our dequantization, one launch, stands in for theirs, which takes three, so the sequences
are faster than theirs by two launches and 0.3 bytes per weight. Each takes x (M, I) and the linears, and returns every
y (M, O); autograd does the rest.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels.operands import Adapter, FrozenWeight, Linear


class _FourBitBase(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: a new bf16 weight in forward and in backward; only quantized bytes are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], *parts: Tensor) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*parts)
        return torch.nn.functional.linear(x, FrozenWeight(parts, shape).dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        dx = dy @ FrozenWeight(parts, ctx.shape).dense(dy.dtype)
        return (dx, None, *(None for _ in parts))


def peft(x: Tensor, linears: tuple[Linear, ...]) -> list[Tensor]:
    """Run PEFT's sequence without autocast: x is cast to fp32, and the adapter's products run in fp32."""
    return [_peft(x, linear, autocast=False) for linear in linears]


def peft_autocast(x: Tensor, linears: tuple[Linear, ...]) -> list[Tensor]:
    """Run PEFT's sequence under autocast to bf16, as transformers' Trainer with bf16=True."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return [_peft(x, linear, autocast=True) for linear in linears]


def _peft(x: Tensor, linear: Linear, *, autocast: bool) -> Tensor:
    adapter = cast(Adapter, linear.adapter)
    result = cast(Tensor, _FourBitBase.apply(x, linear.weight.shape, *linear.weight.parts)).clone()
    adapter_input = x if autocast else x.to(adapter.a.dtype)
    output = torch.nn.functional.linear(torch.nn.functional.linear(adapter_input, adapter.a), adapter.b) * _scale(
        linear
    )
    return result + (output if autocast else output.to(result.dtype))


class _Unsloth(torch.autograd.Function):
    """LoRA_W, and LoRA_QKV's pattern for several: backward recomputes X A^T, and dY B twice per linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: tuple[Linear, ...], *masters: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for linear, a, b in zip(linears, masters[::2], masters[1::2], strict=True):
            y = x @ linear.weight.dense(x.dtype).T
            y.addmm_(x @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=_scale(linear))
            outputs.append(y)
        ctx.linears = linears
        ctx.save_for_backward(x, *masters)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *masters = ctx.saved_tensors
        dx, gradients = None, []
        for linear, dy, a, b in zip(ctx.linears, dys, masters[::2], masters[1::2], strict=True):
            down, up, scale = a.to(dy.dtype), b.to(dy.dtype), _scale(linear)
            da, db = torch.empty_like(down.T), torch.empty_like(up.T)
            da.addmm_(x.T, dy @ up, alpha=scale, beta=0)
            db.addmm_(down @ x.T, dy, alpha=scale, beta=0)
            gradients += [da.T, db.T]
            weight = linear.weight.dense(dy.dtype)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            dx.addmm_(dy @ up, down, alpha=scale)
        return (dx, None, *gradients)


def unsloth(x: Tensor, linears: tuple[Linear, ...]) -> list[Tensor]:
    """Run Unsloth's sequence."""
    masters = [master for linear in linears for master in cast(Adapter, linear.adapter)[:2]]
    return list(cast(tuple[Tensor, ...], _Unsloth.apply(x, linears, *masters)))


def _scale(linear: Linear) -> float:
    scale = cast(Adapter, linear.adapter).scale
    assert isinstance(scale, float)
    return scale
