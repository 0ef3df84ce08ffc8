"""bitsandbytes and PEFT themselves, where they are installed: linears of one input as their modules."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from distlora_kernels.nf4_cpu import has_bitsandbytes
from distlora_kernels.operands import Adapter, FrozenWeight

from .peers import FourBitBase
from .problem import Weights


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


class Modules:
    """Linears of one input, each a module; `parameters` are a and b of each in turn, or none."""

    def __init__(self, modules: list[nn.Module], parameters: list[Tensor]) -> None:
        self.modules = modules
        self.parameters = parameters

    def __call__(self, x: Tensor) -> list[Tensor]:
        return [module(x) for module in self.modules]


class _StandIn(nn.Linear):
    """A base layer that PEFT takes for an ordinary one, over our packed weight: where bitsandbytes is missing."""

    def __init__(self, frozen: FrozenWeight) -> None:
        out, features = frozen.shape
        super().__init__(features, out, bias=False, device="meta")
        # Only its device and dtype are looked at.
        self.weight = nn.Parameter(torch.empty(0, device=frozen.parts[0].device), requires_grad=False)
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, FourBitBase.apply(x, self.frozen.shape, *self.frozen.parts))


def bitsandbytes_linears(weights: Weights) -> Modules:
    """Linear4bit, NF4 with double quantization; quantized from the dense weights, so that codes are ours."""
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
    """PEFT's LoRA layers over Linear4bit; fp32 masters, no dropout.

    Without bitsandbytes over our dequantization: then PEFT takes its layer for dense weights, which does not clone and
    adds in fp32.
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
