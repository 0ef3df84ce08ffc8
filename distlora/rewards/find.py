"""Find the functions that `data.rewards` names without importing their modules: no code runs, and no torch."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

from distlora.config import DataConfig, UserError, nearest
from distlora.config.rewards import BUILT_IN
from distlora.rewards import sandbox
from distlora.rewards.built_in import PACKAGES
from distlora.system.exit_codes import require_package


def check_functions(data: DataConfig, *, on_this_node: bool = True) -> None:
    """Refuse rewards that no module has, and built-in ones that this node cannot compute.

    Modules are searched as processes of rewards do: from the working folder, then where Python looks.
    """
    for name in data.rewards:
        if name not in BUILT_IN:
            _check_function(name)
        elif on_this_node and name in PACKAGES:
            require_package(PACKAGES[name], f"data.rewards=[{name}]")
        elif on_this_node and name == "unit_tests" and (reason := sandbox.reason_against(data.rewards_isolation)):
            raise UserError(f"data.rewards: {reason}")


def _check_function(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    spec: ModuleSpec | None = None
    path: list[str] | None = [os.getcwd(), *sys.path]
    for part in module.split("."):
        spec = PathFinder.find_spec(part if spec is None else f"{spec.name}.{part}", path) if path else None
        if spec is None:
            raise UserError(
                f"data.rewards=[{name}]: there is no module {module} in {os.getcwd()} or among the installed packages; "
                "start from the folder that holds it, or install its package"
            )
        path = spec.submodule_search_locations and [*spec.submodule_search_locations]
    assert spec is not None
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
