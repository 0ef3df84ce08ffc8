"""Define the requests of the benchmarks, from the command to its worker process. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


# The docstrings of these three, and of their fields, are the help texts of their commands.
@dataclass(frozen=True, kw_only=True, slots=True)
class LoadBench:
    """Load a random model of 0.76 billion parameters into NF4 on this machine's CPU.

    That is: without the quantized-weights cache, filling it, and from it, on each number of ranks, beside transformers
    + bitsandbytes. All take turns; five minutes on two idle cores.
    """

    layers: int = 14
    """N: decoder layers of the model."""
    ranks: tuple[int, ...] = (1, 2)
    """N,N: process counts; the processes of a load share two threads."""
    rounds: int = 3
    """N: turns of each way to load."""
    environment: Mapping[str, str] = field(default_factory=dict)  # Variables that the launcher sets for workers.
    out: str | None = None
    """FOLDER: write the results there as Markdown, CSV and a plot."""
    json: bool = False
    """Print every figure as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBench:
    """Measure the memory of a training step by category beside the plan, for random Llamas, in each mode.

    A minute for the smallest model on a CPU, up to half an hour.
    """

    models: tuple[str, ...] = ("10M", "100M")
    """SIZE,SIZE: sizes of the models: 10M, 100M, 0.5B, 1.5B parameters."""
    ranks: tuple[int, ...] = (1, 2)
    """N,N: number of processes, or GPUs."""
    out: str | None = None
    """FOLDER: write the results there as Markdown, CSV and a plot."""
    json: bool = False
    """Print every figure as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointBench:
    """Save and resume a run on this machine's CPU, on one process and two ranks.

    Beside it are PEFT's save_pretrained, Trainer's checkpoints and accelerate's save_state: bytes beside the 12 per
    trained parameter that a resume needs, time of the training thread, seconds until the files are on disk, seconds of
    a resume. Three minutes on two idle cores.
    """

    r: tuple[int, ...] = (16,)
    """N,N: ranks of the adapters, on every linear of a random Llama, 76M parameters in six layers."""
    rounds: int = 4
    """N: rounds of three steps each: saved in the background, saved on the training thread, not saved."""
    tokens: int = 64
    """N: tokens per sequence and step."""
    layers: int = 6
    """N: decoder layers of the model."""
    out: str | None = None
    """FOLDER: write the results there as Markdown, CSV and a plot."""
    json: bool = False
    """Print every figure as JSON."""
