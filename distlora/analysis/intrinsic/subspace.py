"""What is trained in place of a model's parameters: all of them, or coordinates in a random subspace.

Letters: D parameters, d dimensions, M layers.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor, nn

from distlora.analysis import naming
from distlora.analysis.intrinsic.projection import Projection
from distlora.model.build import CausalLM


class FlatParameters:
    """A model's parameters as one vector (D,) and their gradients as another; those of the model are views of them."""

    def __init__(self, model: CausalLM) -> None:
        named = dict(model.named_parameters())  # A tied one once.
        device = next(iter(named.values())).device
        size = sum(parameter.numel() for parameter in named.values())
        self.values = torch.empty(size, device=device)
        self.gradients = torch.zeros(size, device=device)
        first, layers = 0, []
        for name, parameter in named.items():
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
            last = first + parameter.numel()
            with torch.no_grad():
                self.values[first:last] = parameter.flatten()
            parameter.data = self.values[first:last].view_as(parameter)
            parameter.grad = self.gradients[first:last].view_as(parameter)
            layers.append((layer_of(name), first, last))
            first = last
        self.layers: dict[str, slice] = {}
        """Where each layer lies: the embedding, a block, the last norm, a head of its own."""
        for layer, parts in itertools.groupby(layers, key=lambda part: part[0]):
            pieces = list(parts)
            assert layer not in self.layers, f"{layer} lies in two places"
            self.layers[layer] = slice(pieces[0][1], pieces[-1][2])


def layer_of(name: str) -> str:
    """decoder.layers.3.inner.mlp.up_proj.weight -> layers.3; decoder.embed_tokens.weight -> embed_tokens."""
    if naming.in_a_block(name):
        return f"layers.{naming.layer_of(name)}"
    return name.removeprefix("decoder.").partition(".")[0]


class Trainable(Protocol):
    parameters: dict[str, nn.Parameter]
    """What the optimizer updates."""

    def pull(self) -> None:
        """From the gradients of the model's parameters to those of what is trained."""
        ...

    def push(self) -> None:
        """From what is trained to the model's parameters."""
        ...


class Everything:
    """Full fine-tuning."""

    def __init__(self, flat: FlatParameters) -> None:
        theta = nn.Parameter(flat.values)
        theta.grad = flat.gradients
        self.parameters = {"theta": theta}

    def pull(self) -> None:
        pass

    def push(self) -> None:
        pass


class Subspace:
    """theta = theta_0 + sqrt(D/d) P u (DID), or with a factor for each layer i (SAID; arXiv 2012.13255, section 3)
    theta_i = theta_0,i + lambda_i sqrt(D/d) (P u)_i, where the M factors are taken from the d dimensions.

    With the root an Adam step of u moves a parameter by about the learning rate, as one of full fine-tuning does,
    whatever d is: |P u| = |u| and rms(sqrt(D/d) P u) = rms(u).
    """

    def __init__(self, flat: FlatParameters, start: Tensor, *, dimension: int, seed: int, scales_layers: bool) -> None:
        self.flat, self.start = flat, start
        device, size = flat.values.device, len(flat.values)
        coordinates = dimension - (len(flat.layers) if scales_layers else 0)
        assert coordinates > 0, f"{dimension} dimensions for {len(flat.layers)} layers"
        self.projection = Projection(seed, size=size, dimension=coordinates, device=device)
        self.root = (size / coordinates) ** 0.5
        self.u = nn.Parameter(torch.zeros(coordinates, device=device))
        self.parameters = {"u": self.u}
        self.scales: nn.Parameter | None = None
        if scales_layers:
            self.scales = self.parameters["scales"] = nn.Parameter(torch.ones(len(flat.layers), device=device))
        self._moved = torch.zeros(size, device=device)
        """sqrt(D/d) P u."""

    @torch.no_grad()
    def pull(self) -> None:
        gradients = self.flat.gradients
        if self.scales is not None:
            layers = self.flat.layers.values()
            self.scales.grad = torch.stack([self._moved[layer] @ gradients[layer] for layer in layers])
            for layer, scale in zip(layers, self.scales, strict=True):
                gradients[layer] *= scale
        self.u.grad = self.projection.coordinates_of(gradients) * self.root

    @torch.no_grad()
    def push(self) -> None:
        self.projection.parameters_of(self.u * self.root, out=self._moved)
        if self.scales is None:
            torch.add(self.start, self._moved, out=self.flat.values)
            return
        for layer, scale in zip(self.flat.layers.values(), self.scales, strict=True):
            torch.addcmul(self.start[layer], self._moved[layer], scale, out=self.flat.values[layer])
