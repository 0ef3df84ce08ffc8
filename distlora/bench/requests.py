"""Define the requests of the benchmarks, from the command to its worker process. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadBench:
    """The arguments of `distlora bench load`."""

    layers: int = 14
    """Decoder layers of the model."""
    ranks: tuple[int, ...] = (1, 2)
    """Process counts; the processes of a load share two threads."""
    rounds: int = 3
    """Turns of each way to load."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that only our own processes get, as the launcher sets them for workers."""
    out: str | None = None
    """Folder for the result files."""
    json: bool = False
    """Print every figure as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBench:
    """The arguments of `distlora bench memory`."""

    models: tuple[str, ...] = ("10M", "100M")
    ranks: tuple[int, ...] = (1, 2)
    out: str | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointBench:
    """The arguments of `distlora bench checkpoint`."""

    r: tuple[int, ...] = (16,)
    """Adapter ranks."""
    rounds: int = 4
    tokens: int = 64
    """Tokens per sequence and step."""
    layers: int = 6
    """Decoder layers of the model."""
    out: str | None = None
    json: bool = False
