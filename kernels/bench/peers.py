"""Run the linears of one input as PEFT, Unsloth and bitsandbytes do: as sequences in plain torch, and installed.

The sequences were written after reading the code (2026-11): peft/tuners/lora/bnb.py over bitsandbytes' MatMul4Bit, and
unsloth/kernels/fast_lora.py. Our dequantization, one launch, stands in for theirs, which takes three, so the sequences
are faster than theirs by two launches and 0.3 bytes per weight. Each takes x (M, I) and the linears, and returns every
y (M, O); autograd does the rest.
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora_kernels.nf4_cpu import has_bitsandbytes
from distlora_kernels.operands import Adapter, FrozenWeight, Linear

from .problem import Weights


class FourBitBase(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: a new bf16 weight in forward and in backward; only quantized bytes are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], *parts: Tensor) -> Tensor:
        """Return x W^T."""
        ctx.shape = shape
        ctx.save_for_backward(*parts)
        return torch.nn.functional.linear(x, FrozenWeight(parts, shape).dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dX."""
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
    result = cast(Tensor, FourBitBase.apply(x, linear.weight.shape, *linear.weight.parts)).clone()
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


def has_peft() -> bool:
    """Return whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


class Modules:
    """Linears of one input as modules; `parameters` are a and b of each, alternating, or none."""

    def __init__(self, modules: list[nn.Module], parameters: list[Tensor]) -> None:
        self.modules = modules
        self.parameters = parameters

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return every linear's output."""
        return [module(x) for module in self.modules]


class _StandIn(nn.Linear):
    """A base layer for PEFT over our quantized weight, without bitsandbytes."""

    def __init__(self, frozen: FrozenWeight) -> None:
        out, features = frozen.shape
        super().__init__(features, out, bias=False, device="meta")
        # PEFT reads only its device and dtype.
        self.weight = nn.Parameter(torch.empty(0, device=frozen.parts[0].device), requires_grad=False)
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        return cast(Tensor, FourBitBase.apply(x, self.frozen.shape, *self.frozen.parts))


def bitsandbytes_linears(weights: Weights) -> Modules:
    """Return Linear4bit modules with double quantization, from the dense weights, so that codes equal ours."""
    return Modules([_linear4bit(dense) for dense in weights.dense], [])


def _linear4bit(dense: Tensor) -> nn.Module:
    import bitsandbytes

    out, features = dense.shape
    module = bitsandbytes.nn.Linear4bit(
        features, out, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    module.weight = bitsandbytes.nn.Params4bit(
        dense.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
    )
    return cast(nn.Module, module.to(dense.device))


def peft_linears(weights: Weights) -> Modules:
    """Return PEFT's LoRA layers over Linear4bit, with fp32 masters and without dropout.

    Without bitsandbytes they are over our dequantization: PEFT then uses its layer for dense weights, which does not
    clone and adds in fp32.
    """
    import peft

    with_bitsandbytes = has_bitsandbytes()
    bases = [
        _linear4bit(dense) if with_bitsandbytes else _StandIn(linear.weight)
        for dense, linear in zip(weights.dense, weights.linears, strict=True)
    ]
    model: Any = nn.ModuleDict({f"linear{index}": base for index, base in enumerate(bases)})
    model.is_loaded_in_4bit = with_bitsandbytes
    first = cast(Adapter, weights.linears[0].adapter)
    rank, scale = first.a.shape[0], cast(float, first.scale)
    config = peft.LoraConfig(r=rank, lora_alpha=round(scale * rank), target_modules=list(model.keys()))
    peft.inject_adapter_in_model(config, model)
    modules, parameters = list(model.values()), []
    for module, linear in zip(modules, weights.linears, strict=True):
        adapter = cast(Adapter, linear.adapter)
        for layer, master in ((module.lora_A["default"], adapter.a), (module.lora_B["default"], adapter.b)):
            layer.weight = nn.Parameter(master.detach().clone())
            parameters.append(layer.weight)
    return Modules(modules, parameters)
