"""Define the request of each benchmark and pass it from the command to its worker process. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from distlora.config.file import build

Kind = TypeVar("Kind")


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
    threads: int = 2
    """Threads of all processes together."""
    out: str | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """The files that all cells of one problem of `distlora bench step` start from, and how to make them."""

    folder: str
    """Folder of the sequences and the adapters."""
    model: str
    """Folder of the model."""
    settings: str | None = None
    """config.json of a random model that is still to be written, as JSON."""
    vocabulary: int | None = None
    """Vocabulary size of random tokens."""
    length: int
    """Tokens per sequence."""
    rows: int
    """Sequences per step, over all processes."""
    steps: int
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial adapters."""
    r: int
    """Adapter rank."""
    data: str | None = None
    """File of documents; None for random tokens."""
    cache_dir: str | None = None
    """Cache of tokenized data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepJob:
    """The work of one process of a cell of `distlora bench step`."""

    model: str
    data: str
    """File of the packed sequences."""
    adapter: str
    """Folder of the initial adapter, in PEFT's format."""
    length: int
    rows: int
    checkpointing: Literal["none", "block"]
    lr: float
    runs: Literal["ours", "loop", "trainer", "fsdp2"]
    """The training loop that runs."""
    base: Literal["nf4", "none"] = "nf4"
    """quant.method of ours."""
    compile: bool = False
    """train.compile of ours."""
    recipe: Literal["documented", "bf16", "plain", "forced"] = "documented"
    """Variant of a peer's loop."""


def to_argument(request: Any) -> str:
    """Return a request as one command-line argument, in JSON."""
    return json.dumps(dataclasses.asdict(request))


def from_argument(kind: type[Kind], arguments: list[str] | None = None) -> Kind:
    """Return the request in the process' only argument. Raises UserError if a field is unknown or has another type."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    return build(kind, json.loads(text))
