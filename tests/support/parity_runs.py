"""A run on some ranks, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from distlora.parallel import Ranks
from distlora.training import setup, worker
from support.small_models import read_metrics
from support.worlds import World


def run_once(ranks: Ranks, *, run_dir: Path) -> list[dict[str, Any]]:
    """Run the worker once on this rank."""
    worker.run(run_dir, ranks)
    return read_metrics(run_dir)


def outcome(world: World, size: int, run_dir: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses (training and held out, in order) and the final adapter of a prepared run."""
    world.run(size, run_once, run_dir=run_dir)
    return result_of(run_dir)


def result_of(run_dir: Path) -> tuple[list[float], dict[str, Tensor]]:
    """`outcome` of a run that has ended."""
    losses = [line["loss"] if "loss" in line else line["eval_loss"] for line in read_metrics(run_dir)]
    return losses, safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")


def adapters_after(ranks: Ranks, *, run_dir: Path) -> dict[str, Tensor]:
    """Train, and return this rank's own adapters."""
    kept: dict[str, Tensor] = {}
    build = setup.build_model

    def keep(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        kept["model"] = model  # type: ignore[assignment]
        return model

    setup.build_model = keep
    try:
        worker.run(run_dir, ranks)
    finally:
        setup.build_model = build
    return {name: p.detach() for name, p in worker.trained_parameters(kept["model"]).items()}  # type: ignore[arg-type]
