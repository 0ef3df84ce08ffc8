"""Describe one merge: the request that `distlora merge` hands to its worker. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distlora.architecture.families import read_config
from distlora.config import require
from distlora.post.trained import Name, Trained

Onto = Literal["trained", "original"]
"""The base as it was trained on (dequantized NF4, less PiSSA's initial adapter), or as it is stored."""
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeRequest:
    """The request of `distlora merge`. Folders are absolute, defaults filled in."""

    name: Name
    """The run or adapter."""
    out: str
    """New folder for the result."""
    onto: Onto = "trained"
    dtype: Dtype = "fp32"
    """Storage dtype of the merged weights."""


def check_mergeable(trained: Trained, onto: Onto) -> None:
    """Raise UserError for a fully trained model, or an adapter that does not belong to the form of the base `onto`.

    The base alone is accepted: its trained-on form as a dense model.
    """
    spec, place = trained.spec, trained.place
    require(
        spec.adapter.method == "lora",
        f"{place} trained the whole model (adapter=full), so there is nothing to merge: {place}/model is the result; "
        "use that folder",
    )
    if onto == "trained":
        return
    require(
        trained.weights is None or not spec.adapter.for_nf4,
        f"--onto=original: {place} started by LoftQ, so its A and B hold a correction of what NF4 loses of the base, "
        "and the base on disk has lost nothing; leave --onto out",
    )
    require(
        "quantization_config" not in read_config(spec.path),
        f"--onto=original: {spec.model.path} is quantized on disk, so there are no 16-bit weights to merge onto; "
        "leave --onto out",
    )
