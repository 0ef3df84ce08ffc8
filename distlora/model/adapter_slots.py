"""Add and remove trials that share a model. Each has a slot, the number by which sequences choose its adapters.

The model is built for it (`build_model(..., for_slots=True)`), sharded and loaded; then trials come and go between
steps. A trial has the initial adapter and the dropout masks that it has when it trains alone.
"""

from __future__ import annotations

import torch
from torch import nn

from distlora.architecture.expert_targets import expert_names, select_adapted
from distlora.architecture.targets import check_patterns
from distlora.config import AdapterConfig
from distlora.model.adapters import DEFAULT_ADAPTER, AdaptedLinear, LoRAPair, slot_name
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertWeight
from distlora.model.frozen_linear import FrozenLinear


def put_trial(
    model: CausalLM, slot: int, config: AdapterConfig, *, seed: int, device: torch.device
) -> dict[str, nn.Parameter]:
    """Put a trial's initialized adapters into a free slot. Return `trial_parameters`.

    `seed` is the trial's train.seed. Raises UserError, before anything changes, if its targets match nothing.
    """
    for path, weight in _targets(model, config):
        weight.put_adapter(slot, config, path=path, seed=seed, device=device)
    return trial_parameters(model, slot)


def remove_trial(model: CausalLM, slot: int) -> None:
    """Free a slot. Its rows use the base alone from now on."""
    for _, weight in list(model.adapted_weights(slot_name(slot))):
        weight.remove_adapter(slot)


def trial_parameters(model: CausalLM, slot: int) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a slot's trial, in forward order, by their paths in a run alone."""
    inside = f".adapters.{slot_name(slot)}"
    return {
        f"{path.removesuffix(inside)}.adapters.{DEFAULT_ADAPTER}.{name}": parameter
        for path, part in model.named_modules()
        if isinstance(part, LoRAPair) and path.endswith(inside)
        for name, parameter in part.named_parameters()
    }


def _targets(model: CausalLM, config: AdapterConfig) -> list[tuple[str, AdaptedLinear | ExpertWeight]]:
    """Return (Hugging Face path, weight) of the targets, with the checks of build_model."""
    prefix = f"{model.family.decoder}.layers."
    weights = {
        model.hf_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, (AdaptedLinear, ExpertWeight))
    }
    linears = [path for path, weight in weights.items() if isinstance(weight, FrozenLinear) and path.startswith(prefix)]
    targets = set(select_adapted(config, linears, model.family, len(model.blocks)))
    check_patterns(config, targets, [*linears, *expert_names(model.family, len(model.blocks))])
    return [(path, weight) for path, weight in weights.items() if path in targets]
