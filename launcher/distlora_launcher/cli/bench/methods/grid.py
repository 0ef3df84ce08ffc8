"""Define the compared methods, each one change away from rsLoRA of rank 16, and the runs that are due."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    name: str
    """Name in the table; with dashes for spaces, also in the folders of its runs."""
    settings: tuple[str, ...]
    """Overrides besides COMMON."""
    rate: float
    """First learning rate of the search."""


ADAPTED = ("adapter=lora", "quant=none", "adapter.target_modules=all-linear", "adapter.r=16", "adapter.use_rslora=true")


def _but(*changed: str) -> tuple[str, ...]:
    """Return ADAPTED with some settings changed or added."""
    values = dict(word.split("=", 1) for word in (*ADAPTED, *changed))
    return tuple(f"{key}={value}" for key, value in values.items())


METHODS = (
    Method("full", ("adapter=full", "quant=none"), 5e-4),
    Method("LoRA r=8", _but("adapter.r=8", "adapter.use_rslora=false"), 4e-3),
    Method("LoRA r=64", _but("adapter.r=64", "adapter.use_rslora=false"), 4e-3),
    Method("rsLoRA r=8", _but("adapter.r=8"), 4e-3),
    Method("rsLoRA r=16", _but(), 4e-3),
    Method("rsLoRA r=64", _but("adapter.r=64"), 4e-3),
    Method("DoRA r=16", _but("adapter.use_dora=true"), 4e-3),
    Method("QLoRA r=16", _but("quant=nf4"), 4e-3),
    Method("rsLoRA r=16 qv", _but("adapter.target_modules=qv"), 4e-3),
    Method("rsLoRA r=16 attention", _but("adapter.target_modules=attention"), 4e-3),
)
"""Methods; all on attention and MLP (all-linear), unquantized and with lora_alpha=16 unless the name differs."""

COMMON = (
    "tracker=none",
    "train.dtype=bf16",
    "data.sequence_length=256",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.checkpointing=none",
    "train.log_every=8",
    "train.keep=1",
    "adapter.lora_alpha=16",
)
"""Settings of all runs, besides data, steps, seed and schedule (cosine, 3 % warm-up)."""

FACTOR = 2.0
"""Ratio of neighbouring learning rates."""
MOST_RATES = 5
"""Most learning rates per method."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of a comparison besides the method: runs of two setups do not belong in one table."""

    base: str
    """Folder of the demo's base: model/, pairs.jsonl and held_out.jsonl."""
    steps: int
    ranks: int
    seeds: int
    """Runs of each method at its best learning rate."""
    search: bool
    """Whether learning rates are searched; else each method has its first one."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A run: method, learning rate, seed."""

    method: Method
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.method.name.replace(' ', '-').replace('=', '')}_lr{self.rate:g}_seed{self.seed}"

    def overrides(self, setup: Setup, runs: Path, cache_dir: Path) -> list[str]:
        """Return the overrides of `distlora train`."""
        shared = [
            word for word in COMMON if not (word.startswith("adapter.") and "adapter=full" in self.method.settings)
        ]
        return [
            f"model.path={setup.base}/model",
            f"data.path={setup.base}/pairs.jsonl",
            f"data.eval_path={setup.base}/held_out.jsonl",
            f"data.cache_dir={cache_dir}",
            f"run_dir={runs / self.folder}",
            *self.method.settings,
            *shared,
            f"train.max_steps={setup.steps}",
            f"cluster.gpus_per_node={setup.ranks}",
            f"optim.lr={self.rate:g}",
            f"train.seed={self.seed}",
        ]


Losses = Mapping[Planned, float]
"""Held-out loss by finished run; infinity if it diverged."""


def rates_of(method: Method, losses: Losses) -> dict[float, float]:
    """Return the held-out loss by learning rate of a method's runs with seed 0."""
    return {run.rate: loss for run, loss in losses.items() if run.method == method and run.seed == 0}


def best_rate(method: Method, losses: Losses) -> float | None:
    """Return the rate of the lowest held-out loss; None before the first run that did not diverge."""
    tried = {rate: loss for rate, loss in rates_of(method, losses).items() if loss < math.inf}
    return min(tried, key=tried.__getitem__) if tried else None


def next_rate(method: Method, losses: Losses) -> float | None:
    """Return the next rate: the first one, its neighbours, then further out while the best is at an end.

    None if the best lies between two others, or after MOST_RATES.
    """
    tried = rates_of(method, losses)
    for rate in (method.rate, method.rate * FACTOR, method.rate / FACTOR):
        if rate not in tried:
            return rate
    best = min(tried, key=lambda rate: (tried[rate], rate))  # If all diverged, a lower one is next.
    if len(tried) >= MOST_RATES or min(tried) < best < max(tried):
        return None
    return best * FACTOR if best == max(tried) else best / FACTOR


def next_round(setup: Setup, losses: Losses, methods: Sequence[Method] = METHODS) -> list[Planned]:
    """Return the runs that are due, one round of all methods at a time.

    Learning rates come first, then other seeds at the best rate, for methods that have one. Empty if all are done.
    """
    if setup.search:
        wanted = {method: next_rate(method, losses) for method in methods}
        searching = [Planned(method, rate, 0) for method, rate in wanted.items() if rate is not None]
        if searching:
            fewest = min(len(rates_of(run.method, losses)) for run in searching)
            return [run for run in searching if len(rates_of(run.method, losses)) == fewest]
    able = [method for method in methods if best_rate(method, losses) is not None or not rates_of(method, losses)]
    for seed in range(setup.seeds):
        due = [Planned(method, best_rate(method, losses) or method.rate, seed) for method in able]
        due = [run for run in due if run not in losses]
        if due:
            return due
    return []
