"""The model that is planned for: what its config.json says, wherever that lies. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.families import check_config, read_config
from distlora.shapes import ModelShapes, shapes_of

Source = Literal["folder", "hub cache", "built in"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModel:
    name: str
    """As people call it: its folder's name, or its name on the hub."""
    settings: Mapping[str, Any]
    """Its config.json."""
    shapes: ModelShapes
    source: Source
    stored_bytes: int | None = None
    """Bytes of its weights on disk, where that is known."""


def model_in(folder: Path, *, name: str | None = None, new_tokens: int = 0) -> PlannedModel:
    """The model in a folder of Hugging Face's format; its weights need not be there. Raises UserError."""
    settings, place = read_config(folder), folder / "config.json"
    check_config(settings, place)
    shapes = shapes_of(settings, place)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return PlannedModel(
        name=name or folder.name,
        settings=settings,
        shapes=shapes,
        source="folder",
        stored_bytes=sum(sizes) if sizes else None,
    )
