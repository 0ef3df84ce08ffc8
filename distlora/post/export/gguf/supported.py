"""Refuse models and adapters that llama.cpp would compute differently. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlora.architecture.families import FAMILIES
from distlora.config import ModelSpec, UserError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF architecture by model_type."""

CONVERTER = "llama.cpp's convert_hf_to_gguf.py takes many more: write --format hf, and run that script on the folder"

ROPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Supported rope types. `dynamic` differs from `default` only beyond max_position_embeddings, the file's context
length."""


def check_model(model: Mapping[str, Any], place: object) -> None:
    """Raise UserError for a config.json that GGUF cannot express. `place` names it in the message."""
    model_type = str(model.get("model_type"))
    if model_type not in ARCHITECTURES:
        why = "experts" if getattr(FAMILIES.get(model_type), "experts", None) else "its layers"
        raise UserError(
            f"{place}: model_type={model_type!r} is not written as GGUF here, as no test compares {why} with "
            f"llama.cpp's; the families are {', '.join(ARCHITECTURES)}. {CONVERTER}"
        )
    activation = model.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"{place}: hidden_act={activation!r}, and llama.cpp computes silu for every {model_type}, whatever is "
            "asked; write --format hf"
        )
    for rope in (model.get("rope_scaling"), model.get("rope_parameters")):
        _check_rope(rope if isinstance(rope, Mapping) else {}, model_type, place)
    if model_type == "qwen3" and model.get("attention_bias"):
        raise UserError(f"{place}: attention_bias=true, and llama.cpp's qwen3 has no bias on o_proj; write --format hf")


def check_adapter(spec: ModelSpec) -> None:
    """Raise UserError for what llama.cpp's adapters have no tensors for."""
    adapter = spec.adapter
    beyond = {
        "use_dora=true": adapter.use_dora,
        "trainable_token_indices": bool(adapter.trainable_token_indices),
        "modules_to_save": bool(adapter.modules_to_save),
        "model.new_tokens": bool(spec.model.new_tokens),
    }
    for what, is_there in beyond.items():
        if is_there:
            raise UserError(
                f"--format=gguf-lora: the adapter has {what}, and llama.cpp adds B A to weights, nothing else; "
                "write --format gguf, which merges it"
            )


def _check_rope(rope: Mapping[str, Any], model_type: str, place: object) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise UserError(
            f"{place}: rope_type={kind!r}, which GGUF has no word for on {model_type}; it has {', '.join(ROPES)}. "
            f"{CONVERTER}"
        )
    if kind == "yarn" and rope.get("truncate") is False:
        raise UserError(f"{place}: yarn with truncate=false, and llama.cpp always truncates; write --format hf")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{place}: partial_rotary_factor={rope['partial_rotary_factor']}, and llama.cpp turns whole heads of "
            f"{model_type}; write --format hf"
        )
