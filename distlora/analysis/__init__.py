"""Analyze a base and what was trained on it: `distlora analyze ...`. Here: the layer of a weight, by its name."""

import re

_PLACE = re.compile(r"layers\.(\d+)\.(.+?)(?:\.weight)?$")


def in_a_block(name: str) -> bool:
    """Return True for a weight of a decoder layer."""
    return _PLACE.search(name) is not None


def layer_of(name: str) -> int:
    """Return the index of a weight's decoder layer."""
    return int(_place(name)[1])


def linear_of(name: str) -> str:
    """Return the path in the decoder layer: mlp.up_proj; mlp.experts.up_proj stands for all experts."""
    return _place(name)[2]


def _place(name: str) -> re.Match[str]:
    match = _PLACE.search(name)
    assert match is not None, f"{name} is not in a decoder block"
    return match
