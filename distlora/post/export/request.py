"""What `distlora export` is asked to do: the request that the command hands to its worker. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distlora.post.trained import Name, Trained

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One export. Everything is resolved: folders are absolute, defaults filled in."""

    name: Name
    format: str
    """A key of formats.FORMATS."""
    out: str
    """What is made: a folder or a file that does not exist yet."""
    dtype: str | None
    """Of the weights that are written, or what the client is to compute in; None where the format has no choice."""
    onto: Literal["trained", "original"] = "trained"
    """Of a merged format: the base that dW is added to (`distlora merge`)."""
    check: bool = True
    place: str | None = None
    """For the check: where the export lies for now."""

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> Request:
        values = json.loads(text)
        return cls(**{**values, "name": Name(**values["name"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What a format's worker has in hand."""

    request: Request
    trained: Trained
    place: Path
    """To be written: nothing is there yet. It gets the name in the request when it was checked."""
    say: Callable[[str], None]
    """A line now."""
    progress: Callable[[str], None]
    """A line now and then, of those it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A client's logits on the probe text, or its weights, beside those of the model as it was trained, in fp32."""

    what: str
    """Which client, on what, computing in what."""
    difference: float
    """The largest of all."""
    kl: float | None = None
    """Nats a token, from ours to theirs; None of weights."""
    same_top: float | None = None
    """Share of positions whose likeliest token is the same."""
    bound: float | None = None
    """Of `difference`; None where nothing is promised: what the format itself changes."""

    @property
    def within(self) -> bool:
        return math.isfinite(self.difference) and (self.bound is None or self.difference <= self.bound)
