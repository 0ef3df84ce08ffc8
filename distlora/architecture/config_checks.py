"""Check a model's config.json against what distlora supports, before any process starts. Imports no torch.

transformers refuses a damaged one when it builds the model (`architecture_of`); what is refused here would train, and
wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.spec import Architecture, architecture_of
from distlora.config import TrainConfig, UserError, require
from distlora.config.json_files import check_shape, read_object

_AGAIN = "download it again"
MODELOPT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRequest:
    """The checks of a model on a small one of random weights (`distlora check`)."""

    config: str
    """Content of its config.json."""
    place: str
    """The model, for messages."""
    processor: str = "{}"
    """Settings of its image processor, as JSON; an empty object if they are not on this node."""
    ranks: int = 1
    """Processes that also train three steps."""


def check_train(train: TrainConfig, architecture: Architecture) -> None:
    """Refuse objectives, train.mlp_tile and train.checkpointing=selective for layers that cannot run as they need.

    Also train.neftune_alpha for a decoder that needs token ids beside embeddings.
    """
    require(
        train.neftune_alpha is None or architecture.takes_embeddings,
        f"train.neftune_alpha={train.neftune_alpha} changes embeddings, and {architecture.model_type} has a second "
        "table that reads token ids; leave it out",
    )
    require(
        not train.needs.reference or architecture.norm is not None,
        f"train.objective={train.objective}: {architecture.model_type} changes the hidden states between its "
        "layers, or with more than a norm after the last; set train.objective=sft, or {model.path} to another model",
    )
    require(
        train.needs.data in ("documents", "steps") or architecture.documents != "single",
        f"train.objective={train.objective} puts several answers into one sequence, and "
        f"{architecture.model_type} would mix them; set train.objective=sft, or {{model.path}} to another model",
    )
    require(
        train.needs.data != "prompts" or architecture.pages_cache,
        f"train.objective={train.objective} samples with a paged cache of keys and values, which the attention of "
        f"{architecture.model_type} does not take yet; set {{model.path}} to another model",
    )
    task = train.needs.task_type
    require(
        train.needs.labels == 0 or task in architecture.scored_by,
        f"train.objective={train.objective} trains the score of transformers' class for {task}, and "
        f"{architecture.model_type} has none that computes it from {architecture.decoder}'s output; set "
        "{model.path} to another model",
    )
    tile = train.mlp_tile
    if tile is not None and architecture.has_experts:
        raise UserError(
            f"train.mlp_tile={tile} runs an MLP on part of a sequence, and {architecture.model_type} sorts and "
            "balances all tokens of a sequence over experts; leave it out (train.checkpointing=selective "
            "recomputes experts whole)"
        )
    if (tile is not None or train.checkpointing == "selective") and any(
        kind.mlp is None for kind in architecture.kinds
    ):
        setting = "train.checkpointing=selective" if tile is None else f"train.mlp_tile={tile}"
        raise UserError(
            f"{setting} runs the MLP of a layer with its norms by itself, and {architecture.model_type} has layers "
            "that compute it otherwise; set train.checkpointing=block and leave train.mlp_tile out"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model's folder. Raises UserError without one, or if it is not a JSON object.

    Older ModelOpt checkpoints describe their quantization in a file of its own, which is added.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no config.json; point {{model.path}} at a model's folder in Hugging Face format"
        )
    refuse_links(folder)
    config, modelopt_path = read_object(path, _AGAIN), folder / MODELOPT_CONFIG
    if "quantization_config" not in config and modelopt_path.is_file():
        content = read_object(modelopt_path, _AGAIN)
        check_shape(content, {"quantization": dict, "*": object}, modelopt_path, _AGAIN)
        config["quantization_config"] = {"quant_method": "modelopt", **content["quantization"]}
    return config


def refuse_links(folder: Path) -> None:
    """Raise UserError for a link that leaves a model's folder: runs, merges and pushes copy what it shows.

    A snapshot in the hub's cache may link to the files in blobs/ of its repository.
    """
    inside = folder.resolve()
    blobs = inside.parents[1] / "blobs" if inside.parent.name == "snapshots" else inside
    for path in (*folder.iterdir(), *folder.glob("*/*.jinja")):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(inside) and target.parent != blobs:
            raise UserError(
                f"{path} is a link to {target}, outside of its folder, whose files are copied into runs and merged "
                "models; put a copy (cp -r) or a hard link (ln) in its place if all may have it"
            )


def check_config(
    model: Mapping[str, Any], place: Path | str, *, sequence_length: int | None = None, full: bool = False
) -> Architecture:
    """Return the architecture of a config.json. Raises UserError with the reason if the model cannot be trained.

    `place` is the config.json for messages, sequence_length the tokens of a row, `full` full fine-tuning.
    """
    architecture = architecture_of(model, place)
    settings = architecture.text(model)
    if full and architecture.composite:
        raise UserError(
            f"adapter=full would save {architecture.model_type} without its vision tower; set adapter=lora, "
            "or convert the folder to its text model first"
        )
    if full and architecture.has_experts:
        raise UserError(
            f"adapter=full on a mixture of experts ({architecture.model_type}) is covered by no test; set adapter=lora "
            "(adapter.target_modules=all-linear adapts the experts too)"
        )
    _check_class(model, place, architecture)
    # In either format: rope_scaling, or rope_parameters, whole or by layer type.
    ropes = [rope for rope in (settings.get("rope_scaling"), settings.get("rope_parameters")) if rope]
    for rope in (*ropes, *(value for both in ropes for value in both.values())):
        if isinstance(rope, Mapping) and ("rope_type" in rope or "type" in rope):
            _check_rope(rope, settings, place, architecture, sequence_length)
    limit = settings.get("max_position_embeddings")
    if isinstance(limit, int) and sequence_length is not None and sequence_length > limit:
        raise UserError(
            f"{{data.sequence_length}}={sequence_length:,} is beyond the model's {limit:,} positions "
            f"(max_position_embeddings in {place}); set {{data.sequence_length}}={limit} or less"
        )
    return architecture


def _check_class(model: Mapping[str, Any], place: Path | str, architecture: Architecture) -> None:
    """Refuse code that comes with the weights, unless transformers has the very class (Phi-3 on the hub names both)."""
    remote = model.get("auto_map")
    name = remote.get("AutoModelForCausalLM") if isinstance(remote, Mapping) else None
    if isinstance(name, str) and name.rpartition(".")[2] != architecture.model_class:
        raise UserError(
            f"{place}: auto_map requires code that comes with the weights ({name}), which distlora does not run, and "
            f"{architecture.model_class} of transformers may compute something else; use a base without auto_map, or "
            "delete the entry if the two are the same"
        )


def _check_rope(
    rope: Mapping[str, Any],
    settings: Mapping[str, Any],
    place: Path | str,
    architecture: Architecture,
    sequence_length: int | None,
) -> None:
    kind = str(rope.get("rope_type", rope.get("type")))
    if architecture.model_type == "phi3" and kind in ("su", "yarn"):  # As Phi3Config reads them.
        kind = "longrope"
    if kind != "longrope":
        return
    original = settings.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    if original is None:
        original = 4096 if architecture.model_type == "phi3" else settings.get("max_position_embeddings")
    if isinstance(original, int) and sequence_length is not None and sequence_length > original:
        raise UserError(
            f"{{data.sequence_length}}={sequence_length:,} is beyond {original:,} tokens "
            f"(original_max_position_embeddings in {place}), where longrope picks its factors by the longest document "
            "of the batch and packed documents differ from single ones; set {data.sequence_length}="
            f"{original} or less"
        )
