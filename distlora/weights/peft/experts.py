"""adapter.init_from on a mixture of experts: which of a file's tensors belong to which fused weight. Beside
initial_adapter.py, and without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.architecture.families import ExpertLayout
from distlora.architecture.targets import match_ending
from distlora.config import UserError

_WRAPPED = ".base_layer"
"""What PEFT adds to a module's path for each further weight of it that is adapted."""


def parameters_of(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """target_parameters of an adapter_config.json. Raises UserError for anything but names of experts' weights."""
    entries = values.get("target_parameters") or []
    known = ExpertLayout().weights
    if not isinstance(entries, list) or not all(
        isinstance(entry, str) and entry.rpartition(".")[2] in known for entry in entries
    ):
        raise UserError(
            f"{path}: target_parameters={entries!r} are not all weights of experts ({', '.join(known)}), the only "
            "parameters that are adapted here; set another init_from"
        )
    return tuple(sorted(entries))


def by_weight(
    names: Mapping[tuple[str, str], str], parameters: tuple[str, ...], file: Path
) -> dict[tuple[str, str], str]:
    """Names in the file by (path, part), with the path of a fused weight in the place of its wrapper's.

    The first of a module's adapted weights has the most `base_layer` (expert_targets.peft_paths). Raises UserError when
    a module has other wrappers than target_parameters asks for.
    """
    if not parameters:
        return dict(names)
    depths: dict[str, set[int]] = {}
    for path, _ in names:
        module = path.removesuffix(_WRAPPED)
        weights = [f"{module}.{weight}" for weight in ExpertLayout().weights]
        if match_ending(parameters, weights):
            depths.setdefault(module, set()).add(path.count(_WRAPPED))
    places = {}
    for module, found in depths.items():
        adapted = match_ending(parameters, [f"{module}.{weight}" for weight in ExpertLayout().weights])
        if found != set(range(len(adapted))):
            raise UserError(
                f"{file} holds {len(found)} adapters of {module}, and target_parameters={list(parameters)} means "
                f"{len(adapted)} of its weights; save the adapter again"
            )
        for depth, weight in enumerate(reversed(adapted)):
            places[module + _WRAPPED * depth] = weight
    return {(places.get(path, path), part): name for (path, part), name in names.items()}
