"""Define the requests of the benchmarks, from the command to its worker process. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field


# The docstrings of these three, and of their fields, are the help texts of their commands.
@dataclass(frozen=True, kw_only=True, slots=True)
class LoadBench:
    """Benchmark loading a random model of 0.76 billion parameters into NF4, on the CPU.

    Measures a load without the quantized-weights cache, one that fills it and one from it, on each number of ranks,
    beside transformers + bitsandbytes. Five minutes on two idle cores.

    example: distlora bench load --ranks 1
    """

    layers: int = 14
    """N: number of decoder layers of the model."""
    ranks: tuple[int, ...] = (1, 2)
    """N,N: numbers of processes; the processes of a load share two threads."""
    rounds: int = 3
    """N: turns of each way to load."""
    environment: Mapping[str, str] = field(default_factory=dict)  # Variables that the launcher sets for workers.
    out: str | None = None
    """FOLDER: folder for the results as Markdown, CSV and a plot."""
    json: bool = False
    """Print every figure as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBench:
    """Compare the memory of a training step with the plan, by category, for random Llamas in each mode.

    Takes from one minute for the smallest model on a CPU to half an hour.

    example: distlora bench memory --models 10M --ranks 1
    """

    models: tuple[str, ...] = ("10M", "100M")
    """SIZE,SIZE: model sizes: 10M, 100M, 0.5B, 1.5B parameters."""
    ranks: tuple[int, ...] = (1, 2)
    """N,N: numbers of processes, one per GPU."""
    out: str | None = None
    """FOLDER: folder for the results as Markdown, CSV and a plot."""
    json: bool = False
    """Print every figure as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointBench:
    """Benchmark saving and resuming a run on the CPU, on one and two ranks.

    Compares with PEFT's save_pretrained, Trainer's checkpoints and accelerate's save_state: bytes (a resume needs 12
    per trained parameter), time of the training thread, seconds until the files are on disk, seconds of a resume. Three
    minutes on two idle cores.

    example: distlora bench checkpoint --rounds 2
    """

    r: tuple[int, ...] = (16,)
    """N,N: adapter ranks, on every linear of a random Llama (76M parameters in six layers)."""
    rounds: int = 4
    """N: rounds of three steps each: saved in the background, saved on the training thread, not saved."""
    tokens: int = 64
    """N: tokens per sequence and step."""
    layers: int = 6
    """N: number of decoder layers of the model."""
    out: str | None = None
    """FOLDER: folder for the results as Markdown, CSV and a plot."""
    json: bool = False
    """Print every figure as JSON."""
