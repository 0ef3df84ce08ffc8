"""Keep large weights in 4 bits that neither a linear nor transformers' interface of experts holds.

Experts of llama4, dbrx, jetmoe and longcat_flash run their family's own code. Where it reads such a Parameter, it gets
the dequantized tensor: the module's class becomes a subclass with a property of that name. The weight is frozen and has
no adapter. Autograd keeps the dense tensor between a layer's forward and backward, one layer's at a time with
activation checkpointing.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distlora.model.experts import find_experts
from distlora.model.frozen_linear import FrozenTensor

_LEAST = 2**16
"""Elements of the smallest weight that is worth quantizing."""
_SHARE = 32
"""Such a module has at least one in this many of its layer's parameters. Routers and gates have fewer: they decide by
small differences, and stay dense."""


class ReadWeight(FrozenTensor):
    """Frozen weight that a module's own code reads, in `dtype`."""

    def __init__(self, shape: tuple[int, ...], *, format: str | None, dtype: torch.dtype) -> None:
        super().__init__(shape, format=format, dtype=dtype)
        self.dtype = dtype
        self.dense: Tensor | None = None
        """The dequantized weight, from its first use in a forward of the layer to the end of it."""

    def read(self) -> Tensor:
        """Return the dequantized weight. Code that loops over experts reads it once for each."""
        if self.dense is None:
            self.dense = self.frozen_weight.dense(self.dtype)
        return self.dense


def find_large_parameters(layer: nn.Module, linears: Collection[str]) -> list[str]:
    """Return the paths of the Parameters of a layer of the real size (on meta) to be kept in 4 bits.

    `linears`: paths of the modules that become frozen linears.
    """
    others = {path: module for path, module in layer.named_modules() if path not in linears}
    experts = find_experts(layer)
    total = sum(parameter.numel() for parameter in layer.parameters())
    found = []
    for path, module in others.items():
        if path in experts or isinstance(module, (nn.Embedding, nn.Conv1d)):
            continue
        own = {n: p.numel() for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.numel() >= _LEAST}
        if own and _SHARE * sum(own.values()) >= total:
            found += [f"{path}.{name}" for name in own]
    return found


def freeze_parameters(
    layer: nn.Module, formats: Mapping[str, str | None], *, dtype: torch.dtype
) -> dict[str, ReadWeight]:
    """Replace Parameters of a decoder layer by frozen weights, on meta. Return them by path.

    `formats`: the paths in the layer, with the formats of their weights.
    """
    weights = {}
    for path, format in formats.items():
        owner, _, name = path.rpartition(".")
        module = layer.get_submodule(owner)
        weights[path] = ReadWeight(tuple(module.get_parameter(name).shape), format=format, dtype=dtype)
        del module._parameters[name]
        of: Any = type(module)
        # torch.nn.utils.parametrize does the same, but moves the weight to another path than transformers'.
        module.__class__ = _reading(of, name)
        module._modules[name] = weights[path]  # add_module refuses the name of a property.

    def forget(*_: Any) -> None:
        for weight in weights.values():
            weight.dense = None

    if weights:
        layer.register_forward_pre_hook(forget)
        layer.register_forward_hook(forget, always_call=True)  # Recomputation leaves by an exception.
    return weights


@functools.cache
def _reading(of: Any, name: str) -> Any:
    """Return a subclass whose attribute `name` is the dense tensor of its ReadWeight `name`."""

    def read(module: nn.Module) -> Tensor:
        weight = module._modules[name]
        assert isinstance(weight, ReadWeight)
        return weight.read()

    return type(of.__name__, (of,), {"__module__": of.__module__, name: property(read)})
