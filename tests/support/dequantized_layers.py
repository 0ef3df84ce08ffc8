"""Layers whose dequantized weights are counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distlora.config import AdapterConfig
from distlora.model.adapters import AdaptedLinear, BlockContext
from distlora.model.frozen_linear import FrozenLinear, link_shared_inputs
from distlora_kernels.formats import nf4

SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "o_proj": (64, 64)}


class Layer(nn.Module):
    """Two projections of one input and one of their output, quantized."""

    def __init__(self, context: BlockContext) -> None:
        super().__init__()
        for index, (name, (out, features)) in enumerate(SHAPES.items()):
            linear = AdaptedLinear(features, out, bias=False, format="nf4", dtype=torch.float32, context=context)
            linear.add_adapter("default", AdapterConfig(r=4), path=name, seed=0)
            generator = torch.Generator().manual_seed(index)
            parts = nf4.nf4_quantize(torch.randn(out, features, generator=generator) / 8)
            for part, value in zip(("codes", "scales", "group_scale"), parts, strict=False):
                setattr(linear, part, nn.Parameter(value, requires_grad=False))
            linear.offset = parts[3]
            for pair in linear.pairs:
                pair.A = nn.Parameter(torch.randn(4, features, generator=generator))
                pair.B = nn.Parameter(torch.randn(out, 4, generator=generator))
            self.add_module(name, linear)
        link_shared_inputs({name: m for name, m in self.named_children() if isinstance(m, FrozenLinear)})

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        return hidden_states + self.o_proj(torch.tanh(q * torch.cat((k, k), dim=-1)))
