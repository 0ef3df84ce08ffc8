"""Find the functions that `data.rewards` names: by reading their modules' text, then by a process that imports them."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from distlora.config import DataConfig, UserError, nearest
from distlora.rewards import sandbox
from distlora.rewards.built_in import PACKAGES
from distlora.rewards.pool import RewardPool
from distlora.system.atomic_io import sha256
from distlora.system.exit_codes import require_package


def check_functions(data: DataConfig, *, on_this_node: bool = True) -> None:
    """Refuse rewards that no module has, and built-in ones that this node cannot compute. No code runs.

    Modules are searched as processes of rewards do: in data.reward_folder, then where Python looks.
    """
    for name in data.functions:
        _check_function(name, data)
    for name in data.reward_functions:
        if on_this_node and name in PACKAGES:
            require_package(PACKAGES[name], f"data.rewards=[{name}]")
        elif on_this_node and name == "unit_tests" and (reason := sandbox.reason_against(data.rewards_isolation)):
            raise UserError(f"data.rewards: {reason}")


def import_functions(data: DataConfig) -> None:
    """Import the user's functions in a process that computes rewards, as a run does. Raises UserError if it cannot."""
    if data.functions:
        with RewardPool(replace(data, reward_processes=1)):
            pass


def source_digests(names: Iterable[str], folder: str) -> dict[str, str]:
    """Return the SHA-256 of the file of each module with these functions; modules without one are left out."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
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
    attribute = name.rpartition(".")[2]
    tree = _module_tree(name, data)
    if tree is None:
        return  # Compiled: the processes say whether it has the function.
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
            f"{data.typed_function(name)}: its module has no function {attribute}{nearest(attribute, names)}; "
            "name one that it has"
        )


def _module_tree(name: str, data: DataConfig) -> ast.Module | None:
    """Return the syntax tree of a function's module; None for a compiled one."""
    module, typed = name.rpartition(".")[0], data.typed_function(name)
    folder = data.reward_folder or os.getcwd()
    spec = _found(module, folder)
    if spec is None:
        cure = "start from the folder that holds it, set data.reward_folder to it, or install its package"
        if module in data.reward_digests:
            cure = "the run began with it: restore it, or set data.reward_folder in RUN/config.yaml to where it is now"
        raise UserError(f"{typed}: there is no module {module} in {folder} or among the installed packages; {cure}")
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    with open(spec.origin, "rb") as file:
        try:
            return ast.parse(importlib.util.decode_source(file.read()))
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{typed}: {spec.origin} is not valid Python ({error}); correct it") from error


_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "dict": "object"}


def tool_schemas(data: DataConfig) -> list[dict[str, Any]]:
    """Return the definitions of data.tools in the form of transformers' get_json_schema. No code runs.

    They are read off annotations and docstrings of Google's form. Raises UserError for a function without them.
    """
    return [_tool_schema(name, data) for name in data.tools]


def _tool_schema(name: str, data: DataConfig) -> dict[str, Any]:
    typed, attribute, tree = data.typed_function(name), name.rpartition(".")[2], _module_tree(name, data)
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)) if tree else ()
    node = next((node for node in functions if node.name == attribute), None)
    text = ast.get_docstring(node) if node is not None else None
    if node is None or not text:
        what = "has no docstring" if node is not None else "is no function that its module defines by def"
        raise UserError(f"{typed} {what}, which tells the model what it does; write one")
    if node.args.posonlyargs or node.args.vararg or node.args.kwarg or node.args.kwonlyargs:
        raise UserError(f"{typed}: a model calls it by names of arguments; leave out /, * and ** in its signature")
    summary, _, described = text.partition("Args:")
    described = re.split(r"^(?:Returns|Raises|Yields|Examples?):", described, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.split(r"^\s*(\w+)(?: \([^)]*\))?:", described, flags=re.MULTILINE)
    descriptions = dict(zip(entries[1::2], entries[2::2], strict=True))
    parameters: dict[str, Any] = {}
    for argument in node.args.args:
        schema = _json_type(argument.annotation)
        if schema is None:
            raise UserError(
                f"{typed}: the type of its argument {argument.arg} is not known; annotate it with "
                f"{', '.join(_TYPES)}, list[...], Literal[...] or one of these | None"
            )
        words = descriptions.get(argument.arg, "").split()
        parameters[argument.arg] = schema | ({"description": " ".join(words)} if words else {})
    schema = {"type": "object", "properties": parameters}
    if required := [*parameters][: len(parameters) - len(node.args.defaults)]:
        schema["required"] = required
    function = {"name": attribute, "description": " ".join(summary.split()), "parameters": schema}
    return {"type": "function", "function": function}


def _json_type(annotation: ast.expr | None) -> dict[str, Any] | None:
    """Return an annotation as JSON schema; None for one that is absent or unknown."""
    match annotation:
        case ast.Name(id=name) if name in _TYPES:
            return {"type": _TYPES[name]}
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            inner = _json_type(item)
            return inner and {"type": "array", "items": inner}
        case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal"), slice=item):
            values = [item.value for item in (item.elts if isinstance(item, ast.Tuple) else [item])]  # type: ignore[attr-defined]
            kinds = {type(value).__name__ for value in values}
            return {"type": _TYPES[kinds.pop()], "enum": values} if len(kinds) == 1 and kinds <= {*_TYPES} else None
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            inner = _json_type(left)
            return inner and {**inner, "nullable": True}
    return None
