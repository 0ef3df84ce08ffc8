"""Trained token rows, and embedding and LM head trained whole, in a PEFT folder at adapter.init_from. Needs no torch.

PEFT writes the rows of a matrix as one tensor in the order of `trainable_token_indices`. If the vocabulary has grown it
also writes the whole matrices (save_embedding_layers="auto"): the resized base's. They add nothing if every row that
the base lacks is among the trained ones. Modules in `modules_to_save` are written as <path>.weight; a resized matrix
has that name too, and the config tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.safetensors_headers import Segment
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.config import SAVED_MODULES, UserError

_ROWS = re.compile(
    r"base_model\.model\.(?:.+\.)?(?P<matrix>embed_tokens|lm_head)\.token_adapter\."
    r"(?P<kind>trainable_tokens_delta(?:\.default)?|base_layer\.weight)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftTokenRows:
    """The trained rows of one matrix."""

    name: str
    """Name of their tensor (ids, hidden) in the file."""
    ids: tuple[int, ...]
    """Token ids in the order of the tensor's rows."""
    shape: tuple[int, ...]
    whole: tuple[int, ...] | None
    """Shape of the whole matrix, if the file has that too."""


def is_of_rows(name: str) -> bool:
    """Return whether a tensor holds trained rows, or the matrix that they belong to."""
    return _ROWS.fullmatch(name) is not None


def read_initial_rows(
    values: Mapping[str, Any], header: Mapping[str, Segment], folder: Path
) -> dict[str, PeftTokenRows]:
    """Return the trained rows by matrix, from adapter_config.json (`values`) and the file's header.

    Raises UserError for invalid indices, and if config and file contradict each other.
    """
    place, indices = f"{folder}: trainable_token_indices", values.get("trainable_token_indices") or {}
    if not isinstance(indices, Mapping):
        indices = {EMBEDDING: indices}
    tensors: dict[tuple[str, bool], str] = {}
    for name in sorted(header):
        if (match := _ROWS.fullmatch(name)) is not None:
            tensors[match["matrix"], match["kind"] == "base_layer.weight"] = name
    rows: dict[str, PeftTokenRows] = {}
    for path, ids in indices.items():
        matrix = path.rpartition(".")[2]
        if matrix not in (EMBEDDING, HEAD):
            raise UserError(
                f"{place} names {path}, but only rows of {EMBEDDING} and {HEAD} are supported; set another "
                f"{{adapter.init_from}}"
            )
        if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids) or len(set(ids)) < len(ids):
            raise UserError(
                f"{place} has {ids!r} for {matrix}, which are not distinct token ids; save the adapter again"
            )
        if (matrix, False) not in tensors:
            # A tied LM head shares the embedding's rows, so it has no tensor.
            if matrix == HEAD and ids == indices.get(EMBEDDING):
                continue
            raise UserError(f"{place} names {matrix}, whose rows are missing in the file; save the adapter again")
        name = tensors[matrix, False]
        shape = header[name].shape
        if len(shape) != 2 or shape[0] != len(ids):
            raise UserError(f"{folder}: {name} has shape {list(shape)} for {len(ids)} ids; save the adapter again")
        whole = tensors.get((matrix, True))
        rows[matrix] = PeftTokenRows(
            name=name, ids=tuple(ids), shape=shape, whole=None if whole is None else header[whole].shape
        )
    # A tied LM head may be written with copies of the embedding's rows.
    if tensors and EMBEDDING not in rows and {matrix for matrix, _ in tensors} != rows.keys():
        raise UserError(
            f"{folder}: the file has token rows that {place[len(str(folder)) + 2 :]} does not name; "
            "save the adapter again"
        )
    return rows


def settings_of(rows: Mapping[str, PeftTokenRows]) -> dict[str, Any]:
    """Return adapter.trainable_token_indices; empty if no rows are trained, so that the run may train some."""
    indices = {matrix: trained.ids for matrix, trained in rows.items()}
    one = indices[EMBEDDING] if indices.keys() == {EMBEDDING} else indices
    return {"trainable_token_indices": one} if one else {}


def check_rows(rows: Mapping[str, PeftTokenRows], folder: Path, *, stored: int, hidden: int) -> None:
    """Raise UserError for rows of another size than the model's, and for a grown matrix with untrained new rows.

    `stored`: the base's vocab_size.
    """
    for matrix, trained in rows.items():
        if trained.shape[1] != hidden:
            raise UserError(
                f"{folder}: {trained.name} has rows of {trained.shape[1]}, and the model's have {hidden}; set another "
                "{adapter.init_from} or model.path"
            )
        if trained.whole is not None and (untrained := sorted(set(range(stored, trained.whole[0])) - set(trained.ids))):
            raise UserError(
                f"{folder}: {matrix} has grown to {trained.whole[0]:,} rows, and row {untrained[0]} is not among "
                "trainable_token_indices, so the adapter belongs to a base that is not on disk; set another "
                "{adapter.init_from}"
            )


_MODULE = re.compile(r"base_model\.model\.(?:.+\.)?(?P<module>embed_tokens|lm_head)\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftWholeModule:
    """A module that was trained whole."""

    name: str
    """Name of its tensor in the file."""
    shape: tuple[int, ...]


def module_of(name: str) -> str | None:
    """Return embed_tokens or lm_head if a tensor of the file is its weight."""
    match = _MODULE.fullmatch(name)
    return None if match is None else match["module"]


def read_initial_modules(
    values: Mapping[str, Any], header: Mapping[str, Segment], folder: Path
) -> dict[str, PeftWholeModule]:
    """Return the modules trained whole by last name, from adapter_config.json (`values`) and the file's header.

    Raises UserError for unsupported modules, and if config and file contradict each other.
    """
    named = values.get("modules_to_save") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{folder}: modules_to_save={named!r} is not a list of names; save the adapter again")
    stored = {module: name for name in header if (module := module_of(name)) is not None}
    found: dict[str, PeftWholeModule] = {}
    for path in named:
        module = path.rpartition(".")[2]
        if module not in SAVED_MODULES:
            raise UserError(
                f"{folder}: modules_to_save has {path!r}; only {' and '.join(SAVED_MODULES)} are supported; set "
                "another {adapter.init_from}"
            )
        if module not in stored:
            raise UserError(
                f"{folder}: modules_to_save names {path}, which the file does not hold; save the adapter again"
            )
        found[module] = PeftWholeModule(name=stored[module], shape=header[stored[module]].shape)
    return found


def is_of_modules(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a tensor is a module that adapter_config.json (`values`) names as trained whole."""
    named = values.get("modules_to_save")  # `read_initial_modules` refuses anything but a list.
    return isinstance(named, list) and module_of(name) in {str(path).rpartition(".")[2] for path in named}


def modules_setting(modules: Mapping[str, PeftWholeModule]) -> dict[str, Any]:
    """Return adapter.modules_to_save; empty if there are none, so that the run may train some."""
    return {"modules_to_save": tuple(sorted(modules))} if modules else {}


def check_modules(modules: Mapping[str, PeftWholeModule], file: Path, *, rows: Collection[int], hidden: int) -> None:
    """Raise UserError for a matrix of another size than the model's, which may have any of these numbers of `rows`."""
    for trained in modules.values():
        if len(trained.shape) != 2 or trained.shape[0] not in rows or trained.shape[1] != hidden:
            raise UserError(
                f"{file}: {trained.name} has shape {list(trained.shape)}, and the model's has {[max(rows), hidden]}; "
                "set another {adapter.init_from} or model.path, or the adapter's model.new_tokens"
            )
