"""What the groups of conf/ have to choose from."""

from __future__ import annotations

import re
from importlib import resources

from distlora_launcher.compose import CONF_MODULE


def options_of(group: str) -> list[str]:
    """The options of a group by name, numbers in them in their order: llama3_8b before llama3_70b."""
    folder = resources.files(CONF_MODULE) / group
    names = [entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return sorted(names, key=lambda name: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name)])
