"""Mixtures of experts: their frozen fused weights, and per-expert adapters.

transformers keeps the experts of a layer as two 3-D parameters, gate_up_proj and down_proj, and calls them with the
router's choice. `Experts` takes their place with the same arguments; the router and the rest of the layer stay the
family's own. Adapters are PEFT's (`target_parameters`): A (E * r, in) with an expert's r rows next to each other, B
(out, E * r) with the experts innermost, delta W_e = s B_e A_e.

Letters: B rows of the batch, T tokens of all of them, K experts that a token chooses, S = K T, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distlora.adapters import Adapted, BlockContext, LoRAPair
from distlora.config import AdapterConfig
from distlora.families import ExpertLayout
from distlora.quant import FrozenTensor
from distlora_kernels.expert_operands import ExpertAdapter, Routing
from distlora_kernels.experts import combine, dispatch, expert_linear, runs_grouped
from distlora_kernels.operands import RowChoice


class ExpertPair(LoRAPair):
    """One adapter of one fused weight, fp32 masters in PEFT's layout: row e * r + j of A (E * r, in) and column
    j * E + e of B (out, E * r) are the j-th of expert e.
    """

    def __init__(self, in_features: int, out_features: int, *, num_experts: int, rank: int, scaling: float) -> None:
        super().__init__(in_features, out_features, rank=num_experts * rank, scaling=scaling)
        self.num_experts, self.rank = num_experts, rank  # That of one expert.

    def down(self) -> Tensor:
        """(E, r, in): a view of A."""
        return self.A.view(self.num_experts, self.rank, -1)

    def up(self) -> Tensor:
        """(E, out, r): a view of B."""
        return self.B.view(-1, self.rank, self.num_experts).permute(2, 0, 1)

    @torch.no_grad()
    def reset(self, config: AdapterConfig, *, seed: int, name: str) -> None:
        """As a linear's, whose rank is that of one expert."""
        super().reset(config, seed=seed, name=name)
        if config.init == "gaussian":  # std 1 / r, not 1 / (E r).
            self.A.mul_(self.num_experts)


class ExpertWeight(Adapted, FrozenTensor):
    """The fused weight of all experts, frozen, with adapters or none: (E, out, in), or (E, in, out) if `transposed`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        transposed: bool,
        quantized: bool,
        dtype: torch.dtype,
        context: BlockContext,
    ) -> None:
        super().__init__(shape, quantized=quantized, dtype=dtype)
        self.transposed = transposed
        self.num_experts = shape[0]
        self.out_features, self.in_features = reversed(shape[1:]) if transposed else shape[1:]
        self.adapters = nn.ModuleDict()
        self.context = context
        self._scales = None

    @property
    def pairs(self) -> list[ExpertPair]:
        return [pair for pair in self.adapters.values() if isinstance(pair, ExpertPair)]

    def add_adapter(self, name: str, config: AdapterConfig, *, path: str) -> None:
        """One more adapter; by `path`, the weight's Hugging Face name, patterns choose the rank and the scale."""
        self.adapters[name] = ExpertPair(
            self.in_features,
            self.out_features,
            num_experts=self.num_experts,
            rank=config.rank_of(path),
            scaling=config.scaling_of(path),
        )
        self._scales = None

    def forward(self, x: Tensor, routing: Routing, bias: Tensor | None) -> Tensor:
        """x (S, in), sorted by expert -> (S, out), with the adapters that the tokens' rows of the batch use."""
        return expert_linear(
            x, self.frozen_weight, routing, transposed=self.transposed, adapter=self._adapter(routing), bias=bias
        )

    def _adapter(self, routing: Routing) -> ExpertAdapter | None:
        pairs = self.pairs
        if not pairs:
            return None
        a = torch.cat([pair.down() for pair in pairs], dim=1) if len(pairs) > 1 else pairs[0].down()
        b = torch.cat([pair.up() for pair in pairs], dim=2) if len(pairs) > 1 else pairs[0].up()
        scale = self._scale(pairs)
        gate = scale.gate(routing.num_tokens)[routing.tokens] if isinstance(scale, RowChoice) else scale
        return ExpertAdapter(a, b, gate)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x {self.in_features} -> {self.out_features}, {self.storage}"


class Experts(nn.Module):
    """In the place of a family's experts module, with its arguments: gate and up, the activation, down, each expert's
    on the tokens that chose it, weighted and added up.
    """

    def __init__(
        self,
        gate_up_proj: ExpertWeight,
        down_proj: ExpertWeight,
        *,
        biases: Sequence[nn.Parameter] | None,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.gate_up_proj_bias = None if biases is None else biases[0]
        self.down_proj_bias = None if biases is None else biases[1]
        self.activation = activation
        """What the family makes of gate and up: (S, 2 * intermediate) -> (S, intermediate)."""

    def forward(self, hidden_states: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """hidden_states (T, H), choices (T, K) int64 and their weights (T, K) -> (T, H)."""
        sizes = [size for weight in (self.gate_up_proj, self.down_proj) for size in weight.shape[1:]]
        on_host = not runs_grouped(hidden_states, *sizes)
        routing = Routing.of(choices, self.gate_up_proj.num_experts, on_host=on_host)
        gate_up = self.gate_up_proj(dispatch(hidden_states, routing), routing, self.gate_up_proj_bias)
        output = self.down_proj(self.activation(gate_up), routing, self.down_proj_bias)
        weighted = output * weights.T.reshape(-1)[routing.order, None]
        return combine(weighted.to(hidden_states.dtype), routing)


def replace_experts(
    layer: nn.Module, layout: ExpertLayout, *, quantized: bool, dtype: torch.dtype, context: BlockContext
) -> dict[str, ExpertWeight]:
    """Put `Experts` in the place of a decoder layer's own, on meta. Returns the fused weights by their names in it.

    What the family makes of gate and up stays its own method; transformers marks the module with the rest (a bias, a
    transposed weight).
    """
    module = layer.get_submodule(layout.module)
    weights = {
        name: ExpertWeight(
            tuple(module.get_parameter(name).shape),
            transposed=bool(module.is_transposed),
            quantized=quantized,
            dtype=dtype,
            context=context,
        )
        for name in layout.weights
    }
    biases = [module.get_parameter(f"{name}_bias") for name in layout.weights] if module.has_bias else None
    activation: Any = module._apply_gate
    layer.set_submodule(layout.module, Experts(*weights.values(), biases=biases, activation=activation))
    return {f"{layout.module}.{name}": weight for name, weight in weights.items()}
