"""The model that is planned for: what its config.json says, wherever that lies. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import check_config, read_config
from distlora.architecture.gguf_folder import NOTE_NAME, gguf_file
from distlora.architecture.images import ImageLayout, image_layout, processor_settings
from distlora.architecture.kept_weights import expected_headers, kept_tokens, kept_weights, nothing_to_keep
from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME, Segment, read_index
from distlora.architecture.shapes import KEEP, ModelShapes, architecture_named, nearest_architecture, shapes_of
from distlora.config import Config, ModelConfig, UserError
from distlora.config.base import is_hub_name
from distlora.config.json_files import read_object
from distlora_kernels.format_layouts import FORMAT_LAYOUTS, GROUP

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
    """Bytes of its weights on disk, where that is known; of a model that is built in, by the formats of its weights."""
    note: str | None = None
    """Assumption of the plan on the model, as a sentence."""
    why_not_kept: str | None = None
    """Why quant=keep is refused, in a sentence; None if `shapes.kept` has what it keeps."""
    images: ImageLayout | None = None
    """How the model takes images; None: the run has none, or the model's files are not here."""
    processor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of its image processor; empty without them."""


Preview = Callable[[ModelConfig], AbstractContextManager[ModelConfig]]


def find_model(
    config: Config, *, cache: Path | None = None, preview: Preview | None = None, any_length: bool = False
) -> PlannedModel:
    """Return the model of a config from its folder, the hub's cache (`cache`), the built-in sizes, or `preview`.

    No network is used unless `preview` downloads: it gets the config and returns one whose model is a folder. Raises
    UserError if none of them has the model, if it cannot be trained, and unless `any_length` for sequences longer than
    its positions.
    """
    model = config.model
    path, new, full = model.path, len(model.new_tokens), config.adapter.method == "full"
    length = None if any_length else config.data.sequence_length

    def in_folder(folder: str | Path, name: str | None) -> PlannedModel:
        planned = model_in(Path(folder), name=name, new_tokens=new, full=full, sequence_length=length)
        if not config.data.images:
            return planned
        shapes, images = planned.shapes, image_layout(folder)
        if images.ahead:  # Rows with images attend by dense masks.
            shapes = dataclasses.replace(shapes, architecture=dataclasses.replace(shapes.architecture, varlen=False))
        return dataclasses.replace(planned, shapes=shapes, images=images)

    with ExitStack() as stack:
        if not is_hub_name(path):
            if preview is not None and gguf_file(path) is not None:
                planned = in_folder(stack.enter_context(preview(model)).path, None)
            else:
                planned = in_folder(path, model.name)
        elif cache is not None and (snapshot := cached_snapshot(cache, path, model.revision)) is not None:
            planned = dataclasses.replace(in_folder(snapshot, path), source="hub cache")
        elif (settings := architecture_named(path)) is not None:
            check_config(settings, path, sequence_length=length, full=full)
            planned = built_in(path, settings, new_tokens=new)
        elif preview is None:
            raise UserError(
                f"model.path={path} is neither in the hub's cache nor built in{nearest_architecture(path)}; set "
                "model.path to a folder with its config.json"
            )
        else:
            try:
                folder = stack.enter_context(preview(model))
            except UserError as error:  # The hub's answer, which knows nothing of names that are alike.
                near = nearest_architecture(path)
                raise UserError(f"{path} is not built in{near}: {error}" if near else str(error)) from error
            planned = in_folder(folder.path, path)
    if config.data.images:
        note = f"the time of the vision tower{'' if planned.images else ', and its memory,'} is not in that of a step"
        planned = dataclasses.replace(planned, note=f"{planned.note}; {note}" if planned.note else note)
    if not config.quant.exceptions:
        return planned
    return dataclasses.replace(planned, shapes=_with_formats(planned.shapes, config.quant.exceptions))


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


def built_in(name: str, settings: Mapping[str, Any], *, new_tokens: int = 0) -> PlannedModel:
    """Return a model by its config.json in known_models.json.

    The number of spare embedding rows is unknown there, so each new token counts as one more row.
    """
    stored, why_not_kept = _with_kept(shapes_of(settings, name), settings, name)
    return PlannedModel(
        name=name,
        settings=settings,
        shapes=dataclasses.replace(stored, vocabulary=stored.vocabulary + new_tokens),
        source="built in",
        stored_bytes=_shipped_bytes(stored),
        note=note_on(stored),
        why_not_kept=why_not_kept,
    )


def _shipped_bytes(shapes: ModelShapes) -> int:
    """Return the bytes of weights in the formats that they are shipped in, and of all others in 16 bits."""
    total, kinds = 2 * shapes.numel, shapes.architecture.kinds
    for (kind, formats), count in Counter(shapes.layer_formats(KEEP)).items():
        for weight, format in zip(kinds[kind].weights, formats, strict=True):
            if format is not None:
                total += count * (weight.numel * FORMAT_LAYOUTS[format].group_bytes // GROUP - 2 * weight.numel)
    return total


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
    noted = (folder / NOTE_NAME).is_file()
    shapes, why_not_kept = _with_kept(shapes, settings, folder, has_headers=noted or size is not None, is_low_bit=noted)
    if shapes.kept and quantization_method(settings, place) == BNB_NF4:  # quant=nf4 keeps them too.
        layers = ((index, shapes.architecture.layer(index).weights) for index in range(shapes.num_layers))
        linears = {index: [weight.path for weight in weights if weight.kind == "linear"] for index, weights in layers}
        formats = {index: {**dict.fromkeys(paths), **shapes.kept.get(index, {})} for index, paths in linears.items()}
        shapes = dataclasses.replace(shapes, formats=formats)
    rows = rows_with(new_tokens, shapes.vocabulary, folder / "tokenizer.json")
    return PlannedModel(
        name=name or folder.name,
        settings=settings,
        shapes=dataclasses.replace(shapes, vocabulary=rows),
        source="folder",
        stored_bytes=size,
        note=note_on(shapes),
        why_not_kept=why_not_kept,
        processor=processor_settings(folder),
    )


def _with_kept(
    shapes: ModelShapes,
    settings: Mapping[str, Any],
    place: Path | str,
    *,
    has_headers: bool = False,
    is_low_bit: bool = False,
) -> tuple[ModelShapes, str | None]:
    """Return shapes with the formats that quant=keep keeps, or the reason why it cannot.

    The headers of the weights in the folder `place` tell, or config.json where there are none (`has_headers`).
    `is_low_bit`: weights are in low bits though config.json says nothing. Raises UserError for settings of a
    quantization that is not read, and for weights that cannot be read.
    """
    architecture, headers = shapes.architecture, dict[str, Segment]()
    kept: dict[int, dict[str, str | None]] = {}
    is_low_bit = quantization_method(settings, place) is not None or is_low_bit
    if is_low_bit and has_headers:
        headers |= CheckpointFiles(place).headers
    try:
        if is_low_bit and not has_headers:
            headers |= expected_headers(architecture, settings, place)
        for name, weight in kept_weights(architecture, headers).items():
            index, _, path = name.removeprefix(architecture.layer_prefix).partition(".")
            kept.setdefault(int(index), {})[path] = weight.format
    except UserError as error:
        return shapes, str(error)
    tokens = kept_tokens(architecture, headers).formats
    return dataclasses.replace(shapes, kept=kept, kept_tokens=tokens), None if kept else str(nothing_to_keep(place))


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
