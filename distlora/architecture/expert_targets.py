"""Select the weights of a mixture-of-experts model that get an adapter: linears and fused expert weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from distlora.architecture.families import ExpertLayout, Family
from distlora.architecture.targets import match_ending, select_targets, written
from distlora.config import TARGET_PRESETS, AdapterConfig, UserError, nearest

EXPERT_PRESETS = ("mlp", "all-linear")
"""Presets of target_modules that mean the experts too."""

_OLD_NAMES = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "experts")
"""How experts are named as modules: on disk, in PEFT's adapters of earlier models, or by mistake."""


def expert_names(family: Family, num_layers: int) -> list[str]:
    """Hugging Face names of the fused expert weights of all layers; empty for a family without experts."""
    if family.experts is None:
        return []
    module = family.experts.module
    layers = (f"{family.decoder}.layers.{layer}.{module}." for layer in range(num_layers))
    return [layer + weight for layer in layers for weight in family.experts.weights]


def expert_shapes(family: Family, num_layers: int, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return (experts, out, in) of the fused expert weights by name, from the decoder's part of config.json."""
    if family.experts is None:
        return {}
    count, hidden = family.experts.num_experts(settings), settings["hidden_size"]
    inner = settings[family.experts.intermediate]
    sizes = {"gate_up_proj": (count, 2 * inner, hidden), "down_proj": (count, hidden, inner)}
    return {name: sizes[name.rpartition(".")[2]] for name in expert_names(family, num_layers)}


def select_adapted(adapter: AdapterConfig, linears: Sequence[str], family: Family, num_layers: int) -> list[str]:
    """Return the paths that `adapter` gives an adapter to, among the decoder's `linears` and fused expert weights.

    Experts are meant by adapter.target_parameters (a list's entry means what equals it or ends in "." + it, as in
    PEFT); where that is empty, by the presets mlp and all-linear. Routers never are. Raises UserError, with what to
    type, for entries that match nothing, name a router or are no names of linears, and for settings that per-expert
    adapters cannot have.
    """
    if family.experts is None:
        if adapter.target_parameters:
            raise UserError(
                f"adapter.target_parameters={written(adapter.target_parameters)} names weights of experts, and "
                f"{family.model_type} has none; leave it out, and name linears in adapter.target_modules"
            )
        return select_targets(adapter.target_modules, linears)
    experts = expert_names(family, num_layers)
    _check_parameters(adapter, family, experts)
    if _meant(adapter, experts):
        _check_settings(adapter)
    _refuse_names_of_experts(adapter.target_modules, linears, family)
    return select_among(adapter, linears, experts)


def select_among(adapter: AdapterConfig, linears: Sequence[str], experts: Sequence[str]) -> list[str]:
    """select_adapted by the names alone. Raises UserError where no linear is meant that should be."""
    chosen, wanted = _meant(adapter, experts), adapter.target_modules
    if chosen and isinstance(wanted, str) and wanted in EXPERT_PRESETS:
        return [*match_ending(TARGET_PRESETS[wanted], list(linears)), *chosen]
    if chosen and not wanted:
        return chosen
    return [*select_targets(wanted, linears), *chosen]


def check_router_loss(weight: float | None, family: Family) -> None:
    """Refuse train.router_aux_loss where there are no routers."""
    if weight is not None and family.experts is None:
        raise UserError(
            f"train.router_aux_loss={weight} balances routers, and {family.model_type} has none; leave it out"
        )


def peft_paths(adapted: Collection[str]) -> dict[str, str]:
    """Name of an adapted fused weight -> path of the module that holds its adapter in PEFT.

    PEFT wraps the experts module once for each of its weights, in their order; what is wrapped first is the
    `base_layer` of what is wrapped next, and the last has the module's own path.
    """
    paths, weights = {}, ExpertLayout().weights
    for name in adapted:
        module, _, weight = name.rpartition(".")
        later = weights[weights.index(weight) + 1 :]
        paths[name] = module + ".base_layer" * sum(f"{module}.{other}" in adapted for other in later)
    return paths


def _meant(adapter: AdapterConfig, experts: Sequence[str]) -> list[str]:
    if adapter.target_parameters:
        return match_ending(adapter.target_parameters, list(experts))
    return list(experts) if adapter.target_modules in EXPERT_PRESETS else []


def _check_parameters(adapter: AdapterConfig, family: Family, names: list[str]) -> None:
    """Refuse an entry of target_parameters that means nothing."""
    assert family.experts is not None
    for entry in adapter.target_parameters:
        if match_ending([entry], names):
            continue
        short = [f"{family.experts.module}.{weight}" for weight in family.experts.weights]
        router = family.experts.router.rpartition(".")[2]
        if router in entry.split("."):
            reason = f"{entry!r} is the router, which is not trained"
        else:
            reason = f"no weight of the experts is named {entry!r}{nearest(entry, short)}"
        raise UserError(
            f"adapter.target_parameters={written(adapter.target_parameters)}: {reason}; set "
            f"adapter.target_parameters={written(short)}"
        )


def _check_settings(adapter: AdapterConfig) -> None:
    """Refuse what an adapter on a fused weight cannot have."""
    if adapter.lora_dropout > 0:
        raise UserError(
            f"adapter.lora_dropout={adapter.lora_dropout} has no place in adapters of experts: PEFT adds s B A to the "
            "weight, which cannot drop inputs; set adapter.lora_dropout=0, or adapter.target_modules=attention"
        )
    if adapter.use_dora:
        raise UserError(
            "adapter.use_dora=true has no place in adapters of experts: PEFT has no DoRA of fused weights; set "
            "adapter.use_dora=false, or adapter.target_modules=attention"
        )
    if adapter.decomposes:
        raise UserError(
            f"adapter.init={adapter.init} starts from a linear's weight, and experts are targeted, whose weights are "
            "fused; set adapter.init=kaiming, or adapter.target_modules=attention"
        )


def _refuse_names_of_experts(target_modules: str | tuple[str, ...], linears: Sequence[str], family: Family) -> None:
    """Modules that only name routers or experts: neither is a linear here."""
    assert family.experts is not None
    entries = (target_modules,) if isinstance(target_modules, str) else target_modules
    if target_modules in TARGET_PRESETS:
        return
    router = family.experts.router
    short = written(tuple(f"{family.experts.module}.{weight}" for weight in family.experts.weights))
    for entry in entries:
        if match_ending([entry], list(linears)) or any(_fullmatches(entry, path) for path in linears):
            continue
        last = re.split(r"\W", entry)[-1]
        if last == router.rpartition(".")[2] or _fullmatches(entry, f"{family.decoder}.layers.0.{router}"):
            raise UserError(
                f"adapter.target_modules={written(target_modules)}: {entry!r} hits only routers, and a router is not "
                "trained: it would send tokens to experts that were not trained for them; name linears, or all-linear"
            )
        if last in _OLD_NAMES:
            raise UserError(
                f"adapter.target_modules={written(target_modules)}: {entry!r} is no linear of {family.model_type}: its "
                f"experts are fused weights; set adapter.target_parameters={short}, or adapter.target_modules=mlp"
            )


def _fullmatches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False
