"""Runs of the worker on some ranks: whole ones, one that stops at a step, and what they leave."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.config import Config
from distlora.config.file import load_config
from distlora.data.loader import open_data
from distlora.model.build import CausalLM, build_model
from distlora.parallel import Backend, Ranks, parallelize
from distlora.training import setup, worker
from support.small_models import make_run, read_metrics
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
FULL: dict[str, Any] = {"adapter": {"method": "full"}, "quant": {"method": "none"}}


def build_run_model(config: Config, **options: Any) -> CausalLM:
    """Build a model by the settings of a run."""
    return build_model(config.spec, config.train, sequence_length=config.data.sequence_length, **options)


def parallelize_run(model: CausalLM, ranks: Ranks, config: Config) -> Backend:
    return parallelize(model, ranks, config.parallel, shard_degree=config.shard_degree(ranks.world))


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
    adapter = safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return losses_of(read_metrics(run_dir)), adapter


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


def make_full_run(run_dir: Path, folders: Path, model: str = "llama", **train_settings: Any) -> Config:
    """Prepare a run of full fine-tuning."""
    return make_run(run_dir, folders, model, **FULL, train=train_settings)


def losses_of(metrics: list[dict[str, Any]]) -> list[float]:
    """Return losses, training and held out, in order."""
    return [line["loss"] if "loss" in line else line["eval_loss"] for line in metrics]


class Stopped(Exception):
    pass


def run_until(
    ranks: Ranks, *, run_dir: Path, stop_before: int | None = None, free: float | None = None
) -> dict[int, list[int]]:
    """Run the worker to its end, or stop it as it begins the given step.

    `free`: bytes of memory that it finds free; None: the machine's. Returns the rows of each step made, in order.
    """
    original = worker.Trainer._train_step
    rows: dict[int, list[int]] = {}

    def step(self: worker.Trainer) -> None:
        trial = self.trial
        if trial.done == stop_before:
            raise Stopped
        done = trial.done
        original(self)
        rows[done] = [row for row in trial.loader.rows_of_ranks(done).flatten().tolist() if row >= 0]

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(worker.Trainer, "_train_step", step)
        if free is not None:
            patch.setattr(Backend, "free_bytes", lambda self: free)
        worker.run(run_dir, ranks)
    return rows


def started(ranks: Ranks, run_dir: Path) -> tuple[CausalLM, Backend, Any]:
    """Return the loaded, sharded model of a run, and the inputs of its first micro-batch."""
    config = load_config(run_dir)
    model, backend, _ = setup.start_run_model(config, ranks)
    loader, _ = open_data(run_dir, config.train, ranks)
    batch = loader.batch(0).micro_batches[0]
    return model, backend, (batch.input_ids, batch.position_ids, batch.labels)
