"""Find the functions that `data.rewards` names: by reading their modules' text, then by a process that imports them."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from distlora.config import DataConfig, UserError, nearest
from distlora.config.documents import BUILT_IN
from distlora.rewards import sandbox
from distlora.rewards.built_in import PACKAGES
from distlora.rewards.pool import RewardPool
from distlora.system.atomic_io import sha256
from distlora.system.exit_codes import require_package


def check_functions(data: DataConfig, *, on_this_node: bool = True) -> None:
    """Refuse rewards that no module has, and built-in ones that this node cannot compute. No code runs.

    Modules are searched as processes of rewards do: in data.reward_folder, then where Python looks.
    """
    for name in data.rewards:
        if name not in BUILT_IN:
            _check_function(name, data)
        elif on_this_node and name in PACKAGES:
            require_package(PACKAGES[name], f"data.rewards=[{name}]")
        elif on_this_node and name == "unit_tests" and (reason := sandbox.reason_against(data.rewards_isolation)):
            raise UserError(f"data.rewards: {reason}")


def import_functions(data: DataConfig) -> None:
    """Import the user's functions in a process that computes rewards, as a run does. Raises UserError if it cannot."""
    if any(name not in BUILT_IN for name in data.rewards):
        with RewardPool(replace(data, reward_processes=1)):
            pass


def source_digests(names: Iterable[str], folder: str) -> dict[str, str]:
    """Return the SHA-256 of the file of each module with functions of the user; modules without one are left out."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names if name not in BUILT_IN)
    files = {module: spec.origin or "" for module in modules if (spec := _found(module, folder)) is not None}
    return {module: sha256(Path(file)) for module, file in files.items() if os.path.isfile(file)}


def _found(module: str, folder: str) -> ModuleSpec | None:
    """Return where a module is, without importing it or its packages."""
    spec: ModuleSpec | None = None
    path: list[str] | None = [folder, *sys.path]
    for name in module.split("."):
        spec = PathFinder.find_spec(name if spec is None else f"{spec.name}.{name}", path) if path else None
        if spec is None:
            return None
        path = spec.submodule_search_locations and [*spec.submodule_search_locations]
    return spec


def _check_function(name: str, data: DataConfig) -> None:
    module, _, attribute = name.rpartition(".")
    folder = data.reward_folder or os.getcwd()
    spec = _found(module, folder)
    if spec is None:
        cure = "start from the folder that holds it, set data.reward_folder to it, or install its package"
        if module in data.reward_digests:
            cure = "the run began with it: restore it, or set data.reward_folder in RUN/config.yaml to where it is now"
        raise UserError(
            f"data.rewards=[{name}]: there is no module {module} in {folder} or among the installed packages; {cure}"
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # Compiled: the processes say whether it has the function.
    with open(spec.origin, "rb") as file:
        try:
            tree = ast.parse(importlib.util.decode_source(file.read()))
        except (SyntaxError, ValueError) as error:
            raise UserError(
                f"data.rewards=[{name}]: {spec.origin} is not valid Python ({error}); correct it"
            ) from error
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    if attribute not in names and not names & {"*", "__getattr__"}:
        raise UserError(
            f"data.rewards=[{name}]: {spec.origin} has no function {attribute}{nearest(attribute, names)}; "
            "name one that it has"
        )
