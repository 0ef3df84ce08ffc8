"""merge.json: what was merged from what, and what that kept. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config.json_files import check_shape, read_object
from distlora.post.merge.page import PAGE_NAME, markdown
from distlora.system import atomic_io

RECEIPT_NAME = "merge.json"
FORMAT = 1
_AGAIN = "merge again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What stands in merge.json; what later commands add stands in sections of their own names."""

    onto: str
    """trained or original."""
    dtype: str
    """fp32, bf16 or fp16."""
    date: str
    versions: dict[str, str]
    base: dict[str, Any]
    """path, fingerprint, and `files`: the SHA-256 of its weights' files by name."""
    adapter: dict[str, Any] | None
    """place as it was named, folder, `files`; None for the base alone."""
    weights: dict[str, dict[str, Any]]
    """Of each tensor that something was added to: `ratio` ||dW||/||W||, `kept` by form (kept.py), `base_norm` ||W||."""
    total: dict[str, Any]
    """The same of all of them together; `kept.nf4` is of those alone that would be quantized."""
    files: dict[str, str]
    """The SHA-256 of each file of the folder but this one and its page."""
    seconds: float
    measured: dict[str, Any] = field(default_factory=dict)
    """What the merged model was measured to compute (distlora/post/evaluate)."""

    def write(self, folder: Path) -> None:
        """Replace the folder's merge.json, and merge.md, which says the same to people."""
        atomic_io.write_json(folder / RECEIPT_NAME, {"format": FORMAT, **dataclasses.asdict(self)})
        atomic_io.write_text(folder / PAGE_NAME, markdown(self))

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Raises UserError for a folder without one, and for one that is damaged."""
        path = folder / RECEIPT_NAME
        values = read_object(path, _AGAIN)
        check_shape(values, _SHAPE, path, _AGAIN)
        known = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


_SHAPE: dict[str, Any] = {
    "format": int,
    "onto": str,
    "dtype": str,
    "date": str,
    "versions": {"*": str},
    "base": {"path": str, "fingerprint": str, "files": {"*": str}},
    "adapter": (dict, type(None)),
    "weights": {"*": dict},
    "total": dict,
    "files": {"*": str},
    "seconds": float,
    "measured": dict,
}
