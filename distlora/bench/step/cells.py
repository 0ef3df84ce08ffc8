"""Define the models, the ways to train and the cells of `distlora bench step`. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from distlora.architecture.shapes import ARCHITECTURES
from distlora_kernels import native

Checkpointing = Literal["none", "block"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "block")
RANK, LEARNING_RATE = 16, 2e-4
"""Rank and learning rate of the adapters, which are on every linear."""
OURS = "ours"
"""The way that the others are compared with."""
KEPT_PAGES = "peft-bf16-kept-pages"
"""A peer with the environment variables of our workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A random Llama and the step that is measured."""

    settings: dict[str, Any]
    """config.json of the model."""
    rows: int
    """Sequences per step, over all processes."""
    lengths: tuple[int, ...]
    """Tokens per sequence, each measured."""
    checkpointing: tuple[Checkpointing, ...] = ("block",)


def _small(hidden: int, inner: int, layers: int) -> dict[str, Any]:
    heads = hidden // 64
    return {
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }


def _slice(name: str) -> dict[str, Any]:
    settings = {key: value for key, value in ARCHITECTURES[name].items() if key != "model_type"}
    return settings | {"num_hidden_layers": 4}


SIZES: dict[str, dict[str, Size]] = {
    "cpu": {
        "8M": Size(settings=_small(256, 704, 8), rows=4, lengths=(512,), checkpointing=CHECKPOINTING),
        "100M": Size(settings=_small(1024, 2816, 8), rows=4, lengths=(512,), checkpointing=CHECKPOINTING),
        "560M": Size(settings=_small(2048, 5632, 12), rows=2, lengths=(512,)),
    },
    "cuda": {
        "8B/4": Size(settings=_slice("meta-llama/Llama-3.1-8B"), rows=2, lengths=(2048, 8192)),
        "70B/4": Size(settings=_slice("meta-llama/Llama-3.1-70B"), rows=2, lengths=(2048, 8192)),
    },
}
"""Sizes by device type. On a GPU: four decoder layers of the named models."""
DEFAULT_SIZES = {"cpu": ("100M",), "cuda": ("8B/4", "70B/4")}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train."""

    title: str
    needs: tuple[str, ...] = ()
    """Packages that are no dependencies of ours."""
    processes: tuple[int, ...] = (1, 2)
    """Process counts by default; 2 stands for any number above 1."""
    by_default: bool = True

    def runs_on(self, processes: int) -> bool:
        """Return whether the way trains on so many processes."""
        return min(processes, 2) in self.processes


PEFT = ("peft", "bitsandbytes")
WAYS: dict[str, Way] = {
    OURS: Way("distlora, NF4"),
    "ours-compiled": Way("distlora, NF4, train.compile=true"),
    "ours-bf16": Way("distlora, bf16 base", processes=(1,)),
    "peft-documented": Way("PEFT + bitsandbytes, documented recipe", PEFT),
    "peft-bf16": Way("PEFT + bitsandbytes, all in bf16", PEFT),
    KEPT_PAGES: Way("PEFT + bitsandbytes, all in bf16, the environment of ours", PEFT, by_default=False),
    "trainer": Way("Trainer + PEFT + bitsandbytes, documented recipe", (*PEFT, "accelerate"), processes=(1,)),
    "fsdp2": Way("accelerate FSDP2 + PEFT + bitsandbytes, documented recipe", (*PEFT, "accelerate"), processes=(2,)),
    "fsdp2-forced": Way(
        "accelerate FSDP2, its check of the device bypassed", (*PEFT, "accelerate"), processes=(2,), by_default=False
    ),
}
"""documented: fp32 norms, embeddings and LM head (prepare_model_for_kbit_training), fp32 adapters, bf16 autocast.
all in bf16: bf16 adapters, no autocast."""
JOBS: dict[str, dict[str, Any]] = {
    OURS: {"runs": "ours", "base": "nf4", "compile": False},
    "ours-compiled": {"runs": "ours", "base": "nf4", "compile": True},
    "ours-bf16": {"runs": "ours", "base": "none", "compile": False},
    "peft-documented": {"runs": "loop", "recipe": "documented"},
    "peft-bf16": {"runs": "loop", "recipe": "bf16"},
    KEPT_PAGES: {"runs": "loop", "recipe": "bf16"},
    "trainer": {"runs": "trainer"},
    "fsdp2": {"runs": "fsdp2", "recipe": "plain"},
    "fsdp2-forced": {"runs": "fsdp2", "recipe": "forced"},
}
"""Fields of each way's StepJob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to train one model on a number of processes."""

    size: str
    length: int
    rows: int
    """Sequences per step, over all processes."""
    processes: int
    checkpointing: Checkpointing
    way: str
    seed: int = 0
    """Seed of the initial adapter."""

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.rows * self.length

    @property
    def title(self) -> str:
        """Title of the way."""
        return WAYS[self.way].title

    @property
    def group(self) -> Cell:
        """The properties that cells compared with each other share."""
        return dataclasses.replace(self, way=OURS, seed=0)

    @property
    def problem(self) -> str:
        """Name of the group: the model and the step."""
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.size}, {self.rows} x {self.length} tokens, {processes}, checkpointing {self.checkpointing}"


def reason_against(way: str, device: str) -> str | None:
    """Return why a way cannot be measured on this "cpu" or "cuda" device; None if it can."""
    missing = [package for package in WAYS[way].needs if not installed(package)]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    if way == "ours-compiled":
        return (
            "train.compile is for CPUs; on a GPU liger-kernel does the same"
            if device == "cuda"
            else native.unavailable_reason()
        )
    return None


def installed(package: str) -> bool:
    """Return whether a package is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def cells_of(
    sizes: dict[str, Size],
    ways: Sequence[str],
    *,
    processes: Sequence[int],
    checkpointing: Sequence[Checkpointing] | None,
) -> Iterator[Cell]:
    """Yield every cell, group by group; `checkpointing` is None for each size's own modes."""
    for name, size in sizes.items():
        for length in size.lengths:
            for mode in checkpointing or size.checkpointing:
                for world in processes:
                    for way in ways:
                        if WAYS[way].runs_on(world):
                            yield Cell(
                                size=name,
                                length=length,
                                rows=size.rows,
                                processes=world,
                                checkpointing=mode,
                                way=way,
                            )
