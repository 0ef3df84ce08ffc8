"""Which linears get an adapter: a preset, a list of module names, or a regular expression, against a model's paths.

Pure Python: the launcher asks about names read off safetensors headers, model surgery about the modules themselves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from distlora.architecture.spec import Architecture, Weight
from distlora.config import TARGET_PRESETS, AdapterConfig, TrainConfig, UserError, nearest
from distlora.config.base import matches

FUSED_LINEARS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Linears that hold several projections in one weight (phi3), which the preset qv names apart."""


def select_targets(target_modules: str | tuple[str, ...], names: Iterable[str]) -> list[str]:
    """Return the paths among `names` that `adapter.target_modules` selects, in their order.

    A list's entry means every path that equals it or ends in "." + it (as in PEFT); a string is a preset or a regular
    expression for whole paths. A preset means a fused linear (qkv_proj) where it names all that is in it. Raises
    UserError, with the model's names, if nothing or a list's entry matches nothing, or a preset names a part of a fused
    linear.
    """
    paths = list(names)
    available = sorted({path.rpartition(".")[2] for path in paths})
    there = f"the model has {', '.join(available)}" if available else "the model has no linear in its decoder layers"
    setting = f"adapter.target_modules={written(target_modules)}"
    if not isinstance(target_modules, str):
        for entry in target_modules:
            if not match_ending([entry], paths):
                inside = [name for name, parts in FUSED_LINEARS.items() if entry in parts and name in available]
                hint = f" (it is a part of {inside[0]})" if inside else nearest(entry, available)
                raise UserError(f"{setting}: no module is named {entry!r}{hint}; {there}")
        return match_ending(target_modules, paths)
    if target_modules in TARGET_PRESETS:
        selected = match_ending(_with_fused(target_modules, available), paths)
        if not selected:
            wanted = ", ".join(TARGET_PRESETS[target_modules])
            raise UserError(f"{setting} ({wanted}) matches nothing; {there}")
        return selected
    try:
        pattern = re.compile(target_modules)
    except re.error as error:
        raise UserError(
            f"{setting} is neither a preset ({', '.join(TARGET_PRESETS)}) nor a regular expression ({error}); write a "
            f"list, adapter.target_modules=[{','.join(available[:2])}]"
        ) from error
    selected = [path for path in paths if pattern.fullmatch(path)]
    if not selected:
        example = f", such as {paths[0]}" if paths else ""
        hint = nearest(target_modules, [*TARGET_PRESETS, *(f"[{name}]" for name in available)])
        if target_modules in available:
            hint = f"; for all modules of that name write adapter.target_modules=[{target_modules}]"
        raise UserError(
            f"{setting} is not a preset ({', '.join(TARGET_PRESETS)}) and matches nothing as a regular expression for "
            f"whole paths{example}{hint}; {there}"
        )
    return selected


def written(targets: str | Iterable[str]) -> str:
    """Return a list of names as one types it; a preset or a regular expression is returned unchanged."""
    return targets if isinstance(targets, str) else f"[{','.join(targets)}]"


def check_patterns(adapter: AdapterConfig, targets: Iterable[str]) -> None:
    """Refuse a key of rank_pattern or alpha_pattern that changes none of `targets`, the paths that get an adapter."""
    adapted = list(targets)
    short = sorted({path.rpartition(".")[2] for path in adapted})
    for setting, pattern in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for key in idle_keys(pattern, adapted):
            raise UserError(
                f"adapter.{setting}.{key}={pattern[key]} changes no linear with an adapter, or only ones that an "
                f"earlier key matches{nearest(key, short)}; adapter.target_modules means {', '.join(short)}"
            )


def idle_keys(pattern: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the keys of a rank_pattern or alpha_pattern that change nothing; the first match counts."""
    rest, idle = list(paths), []
    for key in pattern:
        taken = [path for path in rest if matches(key, path)]
        if not taken:
            idle.append(key)
        rest = [path for path in rest if path not in taken]
    return idle


def _with_fused(preset: str, available: list[str]) -> list[str]:
    """Return the preset's names and the model's fused linears that hold nothing else."""
    wanted = TARGET_PRESETS[preset]
    fused = {name: parts for name, parts in FUSED_LINEARS.items() if name in available and set(parts) & set(wanted)}
    for name, parts in fused.items():
        if not set(parts) <= set(wanted):
            raise UserError(
                f"adapter.target_modules={preset} ({', '.join(wanted)}) names a part of this model's {name}, which is "
                f"one weight for {', '.join(parts)} and has one adapter or none; "
                f"set adapter.target_modules=[{name}] or attention"
            )
    return [*wanted, *fused]


def match_ending(endings: Iterable[str], paths: list[str]) -> list[str]:
    """Return the paths that equal one of `endings` or end in "." + it, PEFT's rule for a list of target_modules."""
    wanted = tuple(endings)
    dotted = tuple("." + ending for ending in wanted)
    return [path for path in paths if path in wanted or path.endswith(dotted)]


def select_adapted(adapter: AdapterConfig, architecture: Architecture) -> list[str]:
    """Return the Hugging Face paths of the weights that `adapter` gives an adapter to.

    A preset means all linears of its roles but gates of shared experts (`linears`: with them), and the fused weights of
    experts if `mlp` or `all-linear`; adapter.target_parameters means experts by name (a list's entry means what equals
    it or ends in "." + it, as in PEFT). Routers never have one. Raises UserError, with what to type, for entries that
    match nothing, name a router or a weight that can have no adapter, and for settings that adapters of experts cannot
    have.
    """
    every = dict(architecture.adaptable())
    experts = [path for path, weight in every.items() if weight.kind == "experts"]
    if not experts and adapter.target_parameters:
        raise UserError(
            f"adapter.target_parameters={written(adapter.target_parameters)} names weights of experts, and "
            f"{architecture.model_type} has none that can have an adapter; leave it out, and name linears in "
            "adapter.target_modules"
        )
    _check_parameters(adapter, experts)
    if _meant(adapter, experts):
        _check_settings(adapter, "experts")
    elif adapter.expert_sharing != "none":
        raise UserError(
            f"adapter.expert_sharing={adapter.expert_sharing} has no effect, because no experts get adapters; leave it "
            "out" + (", or set adapter.target_modules=all-linear" if experts else "")
        )
    try:
        selected = select_among(adapter, every)
    except UserError as error:
        if not experts:
            raise
        short = written(_short(experts))
        raise UserError(
            f"{error}. Routers are not trained, and experts are fused weights: set adapter.target_parameters={short}, "
            "or adapter.target_modules=mlp"
        ) from error
    refused = [path for path in selected if every[path].no_adapter]
    if refused:
        raise UserError(
            f"adapter.target_modules={written(adapter.target_modules)} names {refused[0]}, which can have no adapter: "
            f"{every[refused[0]].no_adapter}; leave it out"
        )
    if path := next((path for path in selected if every[path].peft_parameter), ""):
        _check_settings(adapter, f"{path}, whose name PEFT takes for experts on {architecture.model_type}")
    return selected


def refuse_frozen_targets(targets: str | tuple[str, ...], architecture: Architecture, tensors: Collection[str]) -> None:
    """Raise UserError if `targets`, or an entry of a list, means modules of a vision tower or a projector alone.

    `tensors`: names of all tensors of the checkpoint.
    """
    if not architecture.composite or targets in TARGET_PRESETS:
        return
    known = architecture.parameters()
    renamed = {architecture.disk.rename(name, known)[0] for name in tensors}
    beside = sorted(name.removesuffix(".weight") for name in renamed - known.keys() if name.endswith(".weight"))
    linears = [path for path, _ in architecture.adaptable()]
    for entry in [targets] if isinstance(targets, str) else [(name,) for name in targets]:
        if not _matching(entry, linears) and (frozen := _matching(entry, beside)):
            raise UserError(
                f"adapter.target_modules={written(entry)} names {frozen[0]}, and only linears of the text model's "
                f"layers are adapted: a vision tower and its projector stay as they are, as vLLM serves them. Leave "
                "it out, or set adapter.target_modules=all-linear"
            )


def _matching(targets: str | tuple[str, ...], paths: list[str]) -> list[str]:
    """Return the paths that a list or a regular expression means; none if it is not valid."""
    if not isinstance(targets, str):
        return match_ending(targets, paths)
    try:
        pattern = re.compile(targets)
    except re.error:  # `select_targets` says so.
        return []
    return [path for path in paths if pattern.fullmatch(path)]


EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the fused weights of experts, in the order of their modules' parameters."""
EXPERT_PRESETS = ("mlp", "experts", "all-linear")
"""Presets of target_modules that mean the experts too."""
_ROLES = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "mixer": ("mixer",),
    "experts": (),
    "all-linear": ("attention", "mlp", "mixer"),
    "linears": ("attention", "mlp", "mixer"),
}
"""Roles of linears by preset."""


def select_among(adapter: AdapterConfig, every: Mapping[str, Weight]) -> list[str]:
    """Select by names and roles alone, as `select_adapted`. Raises UserError if no linear matches."""
    linears = [path for path, weight in every.items() if weight.kind == "linear"]
    experts = [path for path, weight in every.items() if weight.kind == "experts" and not weight.no_adapter]
    chosen, wanted = _meant(adapter, experts), adapter.target_modules
    if isinstance(wanted, str) and wanted in _ROLES:
        gates = wanted == "linears"  # PEFT's all-linear has them too.
        free = [path for path in linears if not (every[path].no_adapter or (every[path].is_gate and not gates))]
        selected = [path for path in free if every[path].role in _ROLES[wanted]]
        if not selected and not chosen:
            roles = sorted({weight.role for weight in every.values() if not weight.no_adapter})
            has = f"has weights of {', '.join(roles)}" if roles else "has no nn.Linear that can have an adapter"
            raise UserError(f"adapter.target_modules={wanted} matches nothing; the model {has}")
        return [*selected, *chosen]
    if chosen and not wanted:
        return chosen
    return [*select_targets(wanted, linears), *chosen]


def _short(experts: Iterable[str]) -> list[str]:
    """Return the names of fused weights from their module on, as one types them."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", path) for path in experts})


def check_router_loss(train: TrainConfig | None, architecture: Architecture, model: Mapping[str, Any]) -> None:
    """Refuse a load-balancing loss where there are no routers, or transformers has no such loss for the type.

    `train`: None where nothing is trained. `model`: the content of config.json, which may ask for the loss too.
    """
    if train is None:
        return
    settings, weight = architecture.text(model), train.router_aux_loss
    wanted = bool(settings.get("output_router_logits") and settings.get("router_aux_loss_coef", 1))
    layouts = [kind.experts for kind in architecture.kinds if kind.experts is not None]
    if any(layout.router and layout.chosen for layout in layouts):
        return
    why = "has none"
    if architecture.has_experts:
        why = "has no such loss in transformers"
    if weight or (weight is not None and not wanted):
        raise UserError(
            f"train.router_aux_loss={weight} balances routers, and {architecture.model_type} {why}; leave it out"
        )
    if weight is None and wanted and train.objective == "sft":
        raise UserError(
            f"config.json asks for a loss that balances routers (output_router_logits), and {architecture.model_type} "
            f"{why}; set train.router_aux_loss=0 to train without it"
        )


def peft_paths(adapted: Collection[str]) -> dict[str, str]:
    """Return, by the name of an adapted fused weight, the path of the module that holds its adapter in PEFT.

    PEFT wraps the experts module once for each of its weights, in their order; what is wrapped first is the
    `base_layer` of what is wrapped next, and the last has the module's own path.
    """
    paths = {}
    for name in adapted:
        module, _, weight = name.rpartition(".")
        later = EXPERT_WEIGHTS[EXPERT_WEIGHTS.index(weight) + 1 :]
        paths[name] = module + ".base_layer" * sum(f"{module}.{other}" in adapted for other in later)
    return paths


def _meant(adapter: AdapterConfig, experts: Sequence[str]) -> list[str]:
    if adapter.target_parameters:
        return match_ending(adapter.target_parameters, list(experts))
    return list(experts) if adapter.target_modules in EXPERT_PRESETS else []


def _check_parameters(adapter: AdapterConfig, names: list[str]) -> None:
    """Refuse an entry of target_parameters that means nothing, such as a router."""
    for entry in adapter.target_parameters:
        if not match_ending([entry], names):
            short = _short(names)
            raise UserError(
                f"adapter.target_parameters={written(adapter.target_parameters)}: no weight of the experts is named "
                f"{entry!r}{nearest(entry, short)}; set adapter.target_parameters={written(short)}"
            )


def _check_settings(adapter: AdapterConfig, what: str) -> None:
    """Refuse what an adapter cannot have on `what`, which PEFT adapts as a parameter (target_parameters)."""
    if adapter.lora_dropout > 0:
        raise UserError(
            f"adapter.lora_dropout={adapter.lora_dropout} is not supported for adapters of {what}: PEFT adds s B A "
            "to the weight, which cannot drop inputs; set adapter.lora_dropout=0, or adapter.target_modules=attention"
        )
    if adapter.use_dora:
        raise UserError(
            f"adapter.use_dora=true is not supported for adapters of {what}: PEFT has no DoRA for parameters; set "
            "adapter.use_dora=false, or adapter.target_modules=attention"
        )
    if adapter.decomposes:
        raise UserError(
            f"adapter.init={adapter.init} is not supported for adapters of {what}: PEFT starts parameters without "
            "their weight; set adapter.init=kaiming, or adapter.target_modules=attention"
        )


EXPERT_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Last names that PEFT turns into fused weights of experts in target_modules, wherever they stand, by the type whose
conversion of checkpoints transformers uses (`distlora.derive.linears.conversion_of`). A linear of such a name is in
target_parameters, by the path of its weight (`Weight.peft_parameter`)."""

MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Types on which PEFT refuses the target out_proj."""


def peft_pattern(pattern: Mapping[str, Any], parameters: Collection[str]) -> dict[str, Any]:
    """Return a rank_pattern or alpha_pattern for PEFT, which matches `parameters` with ".weight" at their ends.

    `parameters`: paths of linears that PEFT adapts as parameters.
    """
    return {
        name: value
        for key, value in pattern.items()
        for name in (key, *([rf"({key})\.weight"] if any(matches(key, path) for path in parameters) else []))
    }


def peft_refusal(model_type: str, path: str) -> str:
    """Return the reason why PEFT cannot adapt the linear at `path`; empty if it can."""
    if path.rpartition(".")[2] == "out_proj" and model_type in MAMBA_TYPES:
        return f"PEFT refuses out_proj on {model_type}, whose CUDA kernels read its weight"
    return ""
