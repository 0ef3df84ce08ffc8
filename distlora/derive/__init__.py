"""Derive the architecture of any model from the module that transformers builds, and prove it on a shrunk one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from distlora.architecture.checkpoint_files import hf_config_of
from distlora.architecture.spec import Architecture, cached_path, kept_text
from distlora.derive.probes import probe
from distlora.derive.prove import proved
from distlora.derive.shrink import shrink
from distlora.derive.structure import structure
from distlora.model.hf_model import auto_class_of, transformers_model

_FROM_SHRUNK = (
    *(
        "attention",
        "varlen",
        "documents",
        "takes_embeddings",
        "takes_cache",
        "pages_cache",
        "head_form",
        "norm",
        "norm_forms",
        "gated_mlps",
        "rotated",
        "fusible",
    ),
    "checks",
)
"""What running the shrunk model has told of the model."""


def derive(content: str, place: str) -> str:
    """Return the JSON of a model's architecture from the content of its config.json.

    What only running a model tells comes from a shrunk one on the CPU, whose own architecture is kept in the cache, so
    that the sizes of one model share it. Raises UserError if the model is not supported.
    """
    began = time.monotonic()
    config = PreTrainedConfig._decode_special_floats(json.loads(content))  # Infinity, as transformers writes it.
    hf_config = hf_config_of(config, place)
    auto_class = auto_class_of(hf_config, place)
    hf_model = transformers_model(hf_config, place, auto_class=auto_class, attention="eager", dtype=torch.bfloat16)
    small, _ = small_of(config, hf_model, place)
    full = structure(hf_model, auto_class=auto_class, kinds={kind.key: kind for kind in small.kinds})
    known = {name: getattr(small, name) for name in _FROM_SHRUNK}
    known["looks_up"] = full.looks_up and small.looks_up
    return dataclasses.replace(full, **known, seconds=time.monotonic() - began).to_json()


def small_of(config: Mapping[str, Any], hf_model: Any, place: str) -> tuple[Architecture, dict[str, Any]]:
    """Return the proved architecture of a model's shrunk one, and the content of its config.json.

    `hf_model`: the model of `config` on the meta device.
    """
    text = json.dumps(shrink(config, hf_model), sort_keys=True)
    kept = kept_text(cached_path(f"small {text}"), lambda: _proved(json.loads(text), place).to_json())
    return Architecture.from_json(kept), json.loads(text)


def _proved(small_config: Mapping[str, Any], place: str) -> Architecture:
    with torch.enable_grad():  # A caller may have switched gradients off.
        return proved(probe(small_config, place), small_config, place)
