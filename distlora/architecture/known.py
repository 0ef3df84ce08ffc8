"""Give the config.json of well-known models by name (known_models.json), so that a run is planned before a download.

The file holds only what sizes and the context length depend on: no other rotary settings, no token ids.
tests/test_architectures.py compares the parameter counts that follow with those that the hub shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from distlora.config.errors import nearest

MXFP4_NAMES = {"openai/gpt-oss-20b": "unsloth/gpt-oss-20b-BF16", "openai/gpt-oss-120b": "unsloth/gpt-oss-120b-BF16"}
"""Models that the hub has in MXFP4, which is not supported, and a bf16 copy of each."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: model["config"]
    for model in json.loads(resources.files("distlora.architecture").joinpath("known_models.json").read_text("utf-8"))
    for name in model["names"]
}
"""Settings of config.json by a model's name on the hub; of a gated original an open copy comes first."""


def architecture_named(name: str) -> Mapping[str, Any] | None:
    """Return the settings of a model by its name on the hub, in any case; None for an unknown model."""
    return {known.lower(): settings for known, settings in ARCHITECTURES.items()}.get(name.lower())


def nearest_architecture(name: str) -> str:
    """Return ` (did you mean ...?)` for a name that may be a mistyped known model."""
    return nearest(name, ARCHITECTURES, cutoff=0.87)
