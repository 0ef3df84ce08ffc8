"""What is said of one thing in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in a run folder."""

    name: str
    """Its path in the run folder."""
    state: Literal["ok", "note", "damaged"]
    """`note`: worth knowing and no damage."""
    said: str
    """What was found; of damage the reason and what to do."""


def ok(name: str, said: str = "") -> Item:
    return Item(name, "ok", said)


def note(name: str, said: str) -> Item:
    return Item(name, "note", said)


def damaged(name: str, said: str) -> Item:
    return Item(name, "damaged", said)
