"""Read what a PEFT adapter trains beside linears: rows of tokens, whole modules, a score. Needs no torch.

If the vocabulary has grown, PEFT also writes the whole matrices (save_embedding_layers="auto"). They add nothing if
every row that the base lacks is among the trained ones. A module in `modules_to_save` has the same name, <path>.weight.
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
from distlora.config.objectives import OBJECTIVES

ROWS = re.compile(
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
        if (match := ROWS.fullmatch(name)) is not None:
            tensors[match["matrix"], match["kind"] == "base_layer.weight"] = name
    rows: dict[str, PeftTokenRows] = {}
    for path, ids in indices.items():
        matrix = path.rpartition(".")[2]
        if matrix not in (EMBEDDING, HEAD):
            raise UserError(
                f"{place} names {path}, but only rows of {EMBEDDING} and {HEAD} are supported; set another "
                f"{{adapter.init_from}}"
            )
        if any(id < 0 for id in ids) or len(set(ids)) < len(ids):
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
        raise UserError(f"{place} does not name all token rows that the file has; save the adapter again")
    return rows


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


MODULE = re.compile(r"base_model\.model\.(?:.+\.)?(?P<module>embed_tokens|lm_head)\.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftWholeModule:
    """A module that was trained whole."""

    name: str
    """Name of its tensor in the file."""
    shape: tuple[int, ...]


SCORE_NAMES = ("score", "classifier")
"""Names that PEFT saves the head of a model of rewards by; transformers' classes of decoders have the first."""


def read_initial_modules(
    values: Mapping[str, Any], header: Mapping[str, Segment], folder: Path
) -> dict[str, PeftWholeModule]:
    """Return the modules trained whole by last name, from adapter_config.json (`values`) and the file's header.

    Raises UserError for unsupported modules, and if config and file contradict each other.
    """
    named = [name for name in values.get("modules_to_save") or [] if name not in SCORE_NAMES]
    stored = {match["module"]: name for name in header if (match := MODULE.fullmatch(name)) is not None}
    modules: dict[str, PeftWholeModule] = {}
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
        modules[module] = PeftWholeModule(name=stored[module], shape=header[stored[module]].shape)
    return modules


def check_modules(modules: Mapping[str, PeftWholeModule], file: Path, *, rows: Collection[int], hidden: int) -> None:
    """Raise UserError for a matrix of another size than the model's, which may have any of these numbers of `rows`."""
    for trained in modules.values():
        if len(trained.shape) != 2 or trained.shape[0] not in rows or trained.shape[1] != hidden:
            raise UserError(
                f"{file}: {trained.name} has shape {list(trained.shape)}, and the model's has {[max(rows), hidden]}; "
                "set another {adapter.init_from} or model.path, or the adapter's model.new_tokens"
            )


SCORE, SCORE_BIAS = "base_model.model.score.weight", "base_model.model.score.bias"


def read_score(values: Mapping[str, Any], header: Mapping[str, Segment], folder: Path) -> PeftWholeModule | None:
    """Return the head of a reward model, from adapter_config.json (`values`) and the file's header; None without one.

    Raises UserError if config and file contradict each other.
    """
    saved = {name for name in values.get("modules_to_save") or () if name in SCORE_NAMES}
    if not saved:
        return None
    if SCORE not in header:
        raise UserError(f"{folder}: modules_to_save names {min(saved)}, and the file has no {SCORE}; save it again")
    return PeftWholeModule(name=SCORE, shape=header[SCORE].shape)


def check_score(score: PeftWholeModule | None, folder: Path, labels: int | None) -> None:
    """Refuse an adapter whose score has another number of outputs than the caller's (`read_peft_adapter`)."""
    if score is not None and labels is not None and score.shape[0] != labels:
        objectives = [name for name, needs in OBJECTIVES.items() if needs.labels == score.shape[0]]
        instead = f"train.objective={objectives[0]} takes it" if objectives else "no objective takes it"
        if labels:
            instead = f"this run's score has {labels}"
        raise UserError(
            f"{{adapter.init_from}}={folder} is a model of rewards: {SCORE} {list(score.shape)} replaces its LM head, "
            f"so that it predicts no tokens ({instead}); set another {{adapter.init_from}}"
        )
