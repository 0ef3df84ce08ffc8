"""What a step must compute, counted from the model's shapes, which MFU divides by what a card can do.

Counted are the operations that the maths asks for: forward, the gradient of every input, the gradients of what is
trained. Recomputation under checkpointing and dequantization are the implementation's, so they lower MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distlora.adapters import AdaptedLinear
from distlora.cards import card_named
from distlora.experts import ExpertWeight
from distlora.model import CausalLM
from distlora.parallel import whole_shape
from distlora.quant import FrozenLinear


def peak_flops(device: torch.device) -> float | None:
    """Of one device; None for a CPU and for a card that is not in distlora/cards.py: no MFU is shown then."""
    card = card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if card is None else card.flops


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """A training step's operations, forward and backward."""

    per_token: int
    """In the linears, the adapters and the head."""
    per_pair: tuple[tuple[int, int | None], ...]
    """(operations a query-key pair, window) of each kind of attention layer, all its layers together."""

    def of(self, position_ids: Tensor) -> int:
        """position_ids (B, T), restarting with each document -> operations of these tokens.

        A token at position p attends to p + 1 tokens, or to as many as its window has: causal attention within
        documents, nothing counted twice.
        """
        total = self.per_token * position_ids.numel()
        for operations, window in self.per_pair:
            pairs = position_ids + 1 if window is None else (position_ids + 1).clamp(max=window)
            total += operations * int(pairs.sum())
        return total


def count_flops(model: CausalLM, *, with_reference: bool = False) -> ModelFlops:
    """Per linear of I x O: 2 IO forward, 2 IO for the input's gradient, 2 IO more where it is trained; an adapter of
    rank R adds 6 R (I + O), N trained rows of the head 6 N I; of experts, those that a token chooses. Routers are not
    counted. Attention, per pair and layer: 4 heads * head_dim forward, 8 backward.

    `with_reference`: every row runs forward once more, without an adapter (DPO).
    """
    config = model.hf_config
    trained = any(parameter.requires_grad for parameter in model.head.parameters())
    again = 2 if with_reference else 0
    per_token = ((6 if trained else 4) + again) * whole_shape(model.head.weight).numel()
    if model.head.token_rows is not None:
        per_token += 6 * model.head.token_rows.rows.numel()
    for module in (module for block in model.blocks for module in block.modules()):
        if isinstance(module, FrozenLinear):
            per_token += (4 + again) * module.in_features * module.out_features
            if isinstance(module, AdaptedLinear):
                ranks = sum(pair.A.shape[0] for pair in module.pairs)
                per_token += 6 * ranks * (module.in_features + module.out_features)
        elif isinstance(module, ExpertWeight):  # A token goes through the experts that it chooses.
            ranks = sum(pair.rank for pair in module.pairs)
            one = (4 + again) * module.in_features * module.out_features
            one += 6 * ranks * (module.in_features + module.out_features)
            per_token += config.num_experts_per_tok * one
        elif isinstance(module, torch.nn.Linear):
            per_token += 6 * module.in_features * module.out_features
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_layer = (12 + 2 * again) * config.num_attention_heads * head_dim
    layers = len(model.blocks)
    windowed = _windowed_layers(config, layers)
    kinds = ((layers - windowed, None), (windowed, getattr(config, "sliding_window", None)))
    return ModelFlops(per_token, tuple((per_layer * number, window) for number, window in kinds if number))


def _windowed_layers(config: object, layers: int) -> int:
    """How many layers see a sliding window only: by layer_types where the family has them, else all or none."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return sum(kind == "sliding_attention" for kind in types)
    return layers if getattr(config, "sliding_window", None) is not None else 0
