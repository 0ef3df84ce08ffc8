"""Linears with adapters for tests of kernels and of the model."""

from __future__ import annotations

import torch

from distlora.config import AdapterConfig
from distlora.model.adapters import AdaptedLinear, BlockContext
from distlora.model.frozen_linear import FrozenLinear


def filled(linear: FrozenLinear, seed: int) -> FrozenLinear:
    """Give a dense linear on the meta device random weights; adapters too, B included."""
    linear.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return linear


def empty(in_features: int, out_features: int, context: BlockContext | None = None) -> AdaptedLinear:
    context = context or BlockContext()
    return AdaptedLinear(in_features, out_features, bias=False, format=None, dtype=torch.float32, context=context)


def adapted(
    context: BlockContext | None = None,
    names: tuple[str, ...] = ("default",),
    seed: int = 0,
    out: int = 40,
    dropout: float = 0.0,
) -> AdaptedLinear:
    linear = empty(32, out, context)
    for index, name in enumerate(names):
        config = AdapterConfig(r=4 + 2 * index, lora_alpha=8.0 + index, lora_dropout=dropout)
        linear.add_adapter(name, config, path=f"model.layers.0.linear_{seed}", seed=0)
    filled(linear, seed)
    return linear
