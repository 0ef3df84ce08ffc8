"""The model that is planned for: what its config.json says, wherever that lies. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import check_config, read_config
from distlora.architecture.gguf_folder import gguf_file
from distlora.architecture.gguf_note import NOTE_NAME
from distlora.architecture.kept_weights import kept_weights
from distlora.architecture.low_bit_methods import NF4, quantization_method
from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME, read_index
from distlora.architecture.shapes import ModelShapes, architecture_named, nearest_architecture, shapes_of
from distlora.config import Config, ModelConfig, UserError
from distlora.config.base import is_hub_name
from distlora.config.json_files import read_object
from distlora.weights.prequantized import read_prequantized_weights

Source = Literal["folder", "hub cache", "built in"]
_AGAIN = "download it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModel:
    """A model as the planner knows it: its config.json and the shapes that follow."""

    name: str
    """Name of its folder, or its name on the hub."""
    settings: Mapping[str, Any]
    """Its config.json."""
    shapes: ModelShapes
    """Shapes, with the rows of new tokens."""
    source: Source
    stored_bytes: int | None = None
    """Bytes of its weights on disk, where that is known; of a model that is built in, what they are in 16 bits."""
    note: str | None = None
    """Assumption of the plan on the model, as a sentence."""
    cannot_keep: UserError | None = None
    """Error of quant=keep; None if `shapes.kept` has what it keeps."""


Preview = Callable[[ModelConfig], AbstractContextManager[ModelConfig]]


def find_model(
    config: Config, *, cache: Path | None = None, preview: Preview | None = None, any_length: bool = False
) -> PlannedModel:
    """Return the model of a config from its folder, the hub's cache (`cache`), the built-in sizes, or `preview`.

    No network is used unless `preview` downloads: it gets the config and returns one whose model is a folder. Raises
    UserError if none of them has the model, if it cannot be trained, and unless `any_length` for sequences longer than
    its positions.
    """
    model = _find_model(config, cache, preview, any_length)
    if not config.quant.exceptions:
        return model
    return dataclasses.replace(model, shapes=_with_formats(model.shapes, config.quant.exceptions))


def _with_formats(shapes: ModelShapes, chosen: Mapping[str, str | None]) -> ModelShapes:
    """Return the shapes with the formats of quant=mixed. Raises UserError for those of another model."""
    formats, left = {index: dict(of_layer) for index, of_layer in shapes.formats.items()}, dict(chosen)
    for index in range(shapes.num_layers):
        for weight in shapes.architecture.layer(index).weights:
            name = f"{shapes.architecture.layer_prefix}{index}.{weight.path}"
            if weight.packs and name in left:
                formats.setdefault(index, {})[weight.path] = left.pop(name)
    if left:
        raise UserError(
            f"quant.formats names {next(iter(left))}, which the layers of this model do not have; measure this model "
            "with `distlora analyze quantization --formats`, and set quant.harm to the result"
        )
    return dataclasses.replace(shapes, formats=formats)


def _find_model(config: Config, cache: Path | None, preview: Preview | None, any_length: bool) -> PlannedModel:
    path, new = config.model.path, len(config.model.new_tokens)
    full, length = config.adapter.method == "full", None if any_length else config.data.sequence_length
    if not is_hub_name(path):
        if preview is not None and gguf_file(path) is not None:
            with preview(config.model) as folder:
                return model_in(Path(folder.path), new_tokens=new, full=full, sequence_length=length)
        return model_in(Path(path), name=config.model.name, new_tokens=new, full=full, sequence_length=length)
    snapshot = None if cache is None else cached_snapshot(cache, path, config.model.revision)
    if snapshot is not None:
        found = model_in(snapshot, name=path, new_tokens=new, full=full, sequence_length=length)
        return dataclasses.replace(found, source="hub cache")
    settings = architecture_named(path)
    # Which weights are in low bits stands in the headers of the weights.
    if settings is not None and (config.quant.method != "keep" or preview is None):
        check_config(settings, path, sequence_length=length, full=full)
        return built_in(path, settings, new_tokens=new)
    if preview is None:
        raise UserError(
            f"model.path={path} is neither in the hub's cache nor built in{nearest_architecture(path)}; set model.path "
            "to a folder with its config.json"
        )
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(preview(config.model))
        except UserError as error:  # The hub's answer, which knows nothing of names that are alike.
            near = nearest_architecture(path)
            raise UserError(f"{path} is not built in{near}: {error}" if near else str(error)) from error
        return model_in(Path(folder.path), name=path, new_tokens=new, full=full, sequence_length=length)


def built_in(name: str, settings: Mapping[str, Any], *, new_tokens: int = 0) -> PlannedModel:
    """Return a model by its config.json in known_models.json.

    The number of spare embedding rows is unknown there, so each new token counts as one more row.
    """
    stored = shapes_of(settings, name)
    return PlannedModel(
        name=name,
        settings=settings,
        shapes=dataclasses.replace(stored, vocabulary=stored.vocabulary + new_tokens),
        source="built in",
        stored_bytes=2 * stored.numel,
        note=note_on(stored),
        cannot_keep=UserError(
            f"quant=keep: the formats of the weights of {name} are read from its checkpoint; download it and set "
            "model.path to its folder, or set quant=nf4"
        ),
    )


def note_on(shapes: ModelShapes) -> str | None:
    """Return the model's notes, and what a plan assumes of layers that it has no formulas for; None without any."""
    notes = shapes.architecture.notes
    if number := sum(count for kind, count in shapes.architecture.counted() if any(kind.memory)):
        notes.append(f"activations of {number} of {shapes.num_layers} layers are scaled from a small model's")
        if any(weight.role == "mixer" for kind in shapes.architecture.kinds for weight in kind.weights):
            notes.append("mixers count as their linears in operations and time")
    return "; ".join(notes) or None


def model_in(
    folder: Path,
    *,
    name: str | None = None,
    new_tokens: int = 0,
    full: bool = False,
    sequence_length: int | None = None,
) -> PlannedModel:
    """Return the model in a folder in Hugging Face format; its weights may be absent. Raises UserError."""
    settings, place = read_config(folder), folder / "config.json"
    check_config(settings, place, full=full, sequence_length=sequence_length)
    size = weights_size(folder)
    shapes = shapes_of(settings, place)
    method, cannot_keep = quantization_method(settings, place), None
    if method == NF4 and size is not None:
        shapes = dataclasses.replace(shapes, formats=_stored_formats(folder, shapes))
    is_low_bit = method not in (None, NF4) or (folder / NOTE_NAME).is_file()
    try:
        shapes = dataclasses.replace(shapes, kept=_kept_formats(folder, shapes, is_low_bit=is_low_bit))
    except UserError as error:
        cannot_keep = error
    rows = rows_with(new_tokens, shapes.vocabulary, folder / "tokenizer.json")
    return PlannedModel(
        name=name or folder.name,
        settings=settings,
        shapes=dataclasses.replace(shapes, vocabulary=rows),
        source="folder",
        stored_bytes=size,
        note=note_on(shapes),
        cannot_keep=cannot_keep,
    )


def _kept_formats(folder: Path, shapes: ModelShapes, *, is_low_bit: bool) -> dict[int, dict[str, str | None]]:
    """Return `ModelShapes.kept` of a checkpoint. Raises UserError if it cannot be kept, or its files are absent."""
    architecture = shapes.architecture
    headers = CheckpointFiles(folder).headers if is_low_bit else {}
    found: dict[int, dict[str, str | None]] = {}
    for name, weight in kept_weights(architecture, headers, folder).items():
        index, _, path = name.removeprefix(architecture.layer_prefix).partition(".")
        found.setdefault(int(index), {})[path] = weight.format
    return found


def _stored_formats(folder: Path, shapes: ModelShapes) -> dict[int, dict[str, str | None]]:
    """Return `ModelShapes.formats` of a quantized checkpoint. Raises UserError if it cannot be kept quantized."""
    base = CheckpointFiles(folder)
    packed, stored_as = read_prequantized_weights(base), shapes.architecture.on_disk(base.headers)
    found: dict[int, dict[str, str | None]] = {}
    for index in range(shapes.num_layers):
        prefix = f"{shapes.architecture.layer_prefix}{index}."
        for weight in shapes.architecture.layer(index).weights:
            names = packed.keys() & stored_as.get(prefix + weight.path, ())
            if names or weight.kind == "linear":
                found.setdefault(index, {})[weight.path] = packed[names.pop()].format if names else None
    return found


def weights_size(folder: Path) -> int | None:
    """Bytes of the safetensors or GGUF files that a model consists of; None where not all of them are there."""
    if (folder / NOTE_NAME).is_file():
        return sum(segment.num_bytes for segment in CheckpointFiles(folder).stored.values())
    index = folder / INDEX_NAME
    files = sorted(set(read_index(index, _AGAIN).values())) if index.is_file() else [SINGLE_NAME]
    if not all((folder / file).is_file() for file in files):
        return None
    return sum((folder / file).stat().st_size for file in files)


def rows_with(new_tokens: int, stored: int, tokenizer: Path) -> int:
    """Return the rows of embedding and LM head with new tokens, which follow the tokenizer's last token.

    Spare rows are used first, as in `distlora.architecture.tokens.vocabulary_of`, which loads the tokenizer. Without a
    tokenizer.json each new token counts as one more row.
    """
    if not new_tokens:
        return stored
    if not tokenizer.is_file():
        return stored + new_tokens
    content = read_object(tokenizer, "copy the tokenizer's files into the folder again")
    ids: list[int] = [token["id"] for token in content.get("added_tokens") or []]
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids += vocabulary.values() if isinstance(vocabulary, Mapping) else [len(vocabulary) - 1]  # Unigram has a list.
    return max(stored, max(ids, default=-1) + 1 + new_tokens)


def cached_snapshot(cache: Path, name: str, revision: str | None) -> Path | None:
    """Return the folder of a model in huggingface_hub's cache that has at least its config.json, or None."""
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    if not commit:
        return None
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None
