"""List the options of the groups in conf/."""

from __future__ import annotations

import functools
import re
from importlib import resources
from importlib.resources.abc import Traversable

import yaml

from distlora_launcher.compose.compose import CONF_MODULE


def options_of(group: str) -> list[str]:
    """Return the options of a group sorted by name, with numbers in numeric order: llama3_8b before llama3_70b."""
    names = [entry.name.removesuffix(".yaml") for entry in _folder(group).iterdir() if entry.name.endswith(".yaml")]
    return sorted(names, key=lambda name: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name)])


@functools.cache
def known_models() -> dict[str, str]:
    """Return the names for model=, each with its name on the hub."""
    folder = _folder("model")
    return {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["path"]
        for name in options_of("model")
        if name != "local"
    }


def _folder(group: str) -> Traversable:
    return resources.files(CONF_MODULE) / group
