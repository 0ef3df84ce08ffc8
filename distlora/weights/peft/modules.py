"""Embedding and head that a PEFT adapter's folder holds whole: what adapter.init_from takes of them. Imports no torch.

PEFT writes what `modules_to_save` trained as <path>.weight. A matrix that it saved because its
size had changed (save_embedding_layers="auto") has that name too; the config tells one from the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import SAVED_MODULES, UserError
from distlora.weights.segments import Segment

_MODULE = re.compile(r"base_model\.model\.(?:.+\.)?(?P<module>embed_tokens|lm_head)\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialModule:
    """A module that was trained whole."""

    name: str
    """Its tensor in the file."""
    shape: tuple[int, ...]


def module_of(name: str) -> str | None:
    """Which of embed_tokens and lm_head a tensor of the file is the weight of."""
    match = _MODULE.fullmatch(name)
    return None if match is None else match["module"]


def read_initial_modules(
    values: Mapping[str, Any], header: Mapping[str, Segment], folder: Path
) -> dict[str, InitialModule]:
    """By last name, from adapter_config.json (`values`) and the file's header.

    Raises UserError for modules that are not trained here, and where config and file differ.
    """
    named = values.get("modules_to_save") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{folder}: modules_to_save={named!r} is not a list of names; save the adapter again")
    stored = {module: name for name in header if (module := module_of(name)) is not None}
    found: dict[str, InitialModule] = {}
    for path in named:
        module = path.rpartition(".")[2]
        if module not in SAVED_MODULES:
            raise UserError(
                f"{folder}: modules_to_save has {path!r}; beside adapters {' and '.join(SAVED_MODULES)} alone can be "
                "trained whole here; set another init_from"
            )
        if module not in stored:
            raise UserError(
                f"{folder}: modules_to_save names {path}, which the file does not hold; save the adapter again"
            )
        found[module] = InitialModule(name=stored[module], shape=header[stored[module]].shape)
    return found


def is_of_modules(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a tensor of the file is a module that adapter_config.json (`values`) says was trained whole."""
    named = values.get("modules_to_save")  # `read_initial_modules` refuses what is no list.
    return isinstance(named, list) and module_of(name) in {str(path).rpartition(".")[2] for path in named}


def modules_setting(modules: Mapping[str, InitialModule]) -> dict[str, Any]:
    """adapter.modules_to_save; nothing where there are none, so that the run may train some."""
    return {"modules_to_save": tuple(sorted(modules))} if modules else {}


def check_modules(modules: Mapping[str, InitialModule], file: Path, *, rows: Collection[int], hidden: int) -> None:
    """Refuse a matrix of another size than the model's, which may have any of these numbers of `rows`."""
    for of in modules.values():
        if len(of.shape) != 2 or of.shape[0] not in rows or of.shape[1] != hidden:
            raise UserError(
                f"{file}: {of.name} has shape {list(of.shape)}, and the model's has {[max(rows), hidden]}; set another "
                "adapter.init_from or model.path, or the adapter's own model.new_tokens"
            )
