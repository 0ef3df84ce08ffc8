"""Adapters of several trials on one base: put a trial's into a free slot of the model, and take them out again."""

from __future__ import annotations

import torch
from torch import nn

from distlora.architecture.targets import check_patterns, select_adapted
from distlora.config import AdapterConfig
from distlora.model.adapters import DEFAULT_ADAPTER, AdaptedLinear, LoRAPair, slot_name, start_pair
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertWeight
from distlora.model.lm_head import LossHead


def put_trial(
    model: CausalLM,
    slot: int,
    config: AdapterConfig,
    *,
    seed: int,
    device: torch.device,
    layers: bool = True,
    head: bool = False,
) -> dict[str, nn.Parameter]:
    """Put a trial's initialized adapters into a free slot. Return `trial_parameters`.

    `seed` is the trial's train.seed. `layers`: weights of the decoder layers have adapters, `head`: the LM head has
    one. Raises UserError, before anything changes, if the targets match nothing.
    """
    for path, weight in _targets(model, config) if layers else []:
        pair = weight.add_adapter(slot_name(slot), config, path=path, seed=seed, slot=slot, device=device)
        start_pair(pair, weight, config, seed=seed, name=f"{path}.{DEFAULT_ADAPTER}")
    if head:
        path, sizes = model.architecture.head, (model.hf_config.hidden_size, model.vocabulary.rows)
        pair = LoRAPair(*sizes, slot=slot, rank=config.r, scaling=config.scaling_of(path), device=device)
        pair.reset(config, seed=seed, name=f"{path}.{DEFAULT_ADAPTER}")
        model.head.adapters[slot_name(slot)] = pair
    return trial_parameters(model, slot)


TrialAdapters = list[tuple[AdaptedLinear | ExpertWeight | LossHead, LoRAPair]]
"""Weights and their adapters of one trial."""


def remove_trial(model: CausalLM, slot: int) -> TrialAdapters:
    """Free a slot, whose rows use the base alone from now on. Return its adapters, for `insert_trial`."""
    name = slot_name(slot)
    removed: TrialAdapters = []
    for _, weight in list(model.adapted_modules(name)):
        pair = weight.adapters.pop(name)
        assert isinstance(pair, LoRAPair)
        removed.append((weight, pair))
    return removed


def insert_trial(adapters: TrialAdapters, slot: int) -> None:
    """Put adapters that `remove_trial` took out into a free slot, another one or the same."""
    for weight, pair in adapters:
        pair.slot = slot
        weight.adapters[slot_name(slot)] = pair


def trial_parameters(model: CausalLM, slot: int) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a slot's trial, in forward order, by their paths in a run alone."""
    inside = f".adapters.{slot_name(slot)}"
    return {
        f"{path.removesuffix(inside)}.adapters.{DEFAULT_ADAPTER}.{name}": parameter
        for path, child in model.named_modules()
        if isinstance(child, LoRAPair) and path.endswith(inside)
        for name, parameter in child.named_parameters()
    }


def _targets(model: CausalLM, config: AdapterConfig) -> list[tuple[str, AdaptedLinear | ExpertWeight]]:
    """Return (Hugging Face path, weight) of the targets, with the checks of build_model."""
    targets = set(select_adapted(config, model.architecture))
    check_patterns(config, targets)
    weights = (
        (model.hf_name(name), module)
        for name, module in model.named_modules()
        if isinstance(module, (AdaptedLinear, ExpertWeight))
    )
    return [(path, weight) for path, weight in weights if path in targets]
