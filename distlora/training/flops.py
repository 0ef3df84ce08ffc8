"""Count the FLOPs of a step from the model's shapes, for MFU.

Counted are forward, the gradients of all inputs and the gradients of trained parameters. Recomputation and
dequantization are implementation costs, so they lower MFU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distlora.config.plan import find_gpu
from distlora.model.adapters import AdaptedLinear, LoRAPair
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertWeight
from distlora.model.frozen_linear import FrozenLinear
from distlora.parallel import whole_shape
from distlora.planner.flops import ActiveWeights, ModelFlops, queries_by_window


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's peak FLOP/s; None for a CPU and for a GPU that is not in distlora/config/plan.py (no MFU then)."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.flops


def count_flops(model: CausalLM, *, with_reference: bool = False, slot: int | None = None) -> ModelFlops:
    """Return the operations of a training step (distlora.planner.flops).

    `with_reference`: every row runs forward once more, without an adapter (DPO). `slot`: count only this slot's
    adapters.
    """
    return active_weights(model, slot).model_flops(with_reference=with_reference)


def active_weights(model: CausalLM, slot: int | None = None) -> ActiveWeights:
    """Return the weights that a token uses, module by module, with all adapters or one slot's."""
    config = model.hf_config
    linears, trained, adapters = 0, 0, 0
    for module in (module for block in model.blocks for module in block.modules()):
        if isinstance(module, FrozenLinear):
            linears += module.in_features * module.out_features
            if isinstance(module, AdaptedLinear):
                adapters += _ranks(module.pairs, slot) * (module.in_features + module.out_features)
        elif isinstance(module, ExpertWeight):  # A token uses the experts that it chooses.
            chosen = config.num_experts_per_tok
            linears += chosen * module.in_features * module.out_features
            adapters += chosen * _ranks(module.pairs, slot) * (module.in_features + module.out_features)
        elif isinstance(module, torch.nn.Linear):
            trained += module.in_features * module.out_features
    assert linears == 0 or trained == 0, "linears are frozen, or all of them are trained"
    rows = model.head.token_rows
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ActiveWeights(
        linears=linears + trained,
        linears_are_trained=trained > 0,
        adapters=adapters,
        head=whole_shape(model.head.weight).numel(),
        head_is_trained=any(parameter.requires_grad for parameter in model.head.parameters()),
        head_rows=0 if rows is None else rows.rows.numel(),
        queries=queries_by_window(config.num_attention_heads * head_dim, _windows(config, len(model.blocks))),
    )


def _ranks(pairs: Iterable[LoRAPair], slot: int | None) -> int:
    return sum(pair.rank for pair in pairs if slot in (None, pair.slot))


def _windows(config: object, layers: int) -> list[int | None]:
    """Return each layer's attention window, from layer_types if the family has them; None: all tokens are visible."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if types is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in types]
