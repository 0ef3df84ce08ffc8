"""A run without a folder: the trainer over given rows, which a benchmark advances step by step."""

from __future__ import annotations

from typing import Any

from distlora.checkpoints.state import Progress
from distlora.config import Config
from distlora.data.loader import PackedRows, StepLoader
from distlora.parallel import Ranks
from distlora.parallel.control import Control
from distlora.reporting.reporter import Reporter
from distlora.startup import start_adapters, start_model
from distlora.train import trained_parameters
from distlora.training.optim import build_optimizer
from distlora.training.trainer import Trainer
from distlora.training.trial import Hooks, Trial


def _nothing(*arguments: Any) -> None:
    """What is saved and published of a run that nobody wants."""


def start_trial(config: Config, ranks: Ranks, rows: PackedRows, *, reporter: Reporter) -> tuple[Trainer, Trial]:
    """A run of these settings on this rank, in the order of the rows; every rank makes it alike. It saves nothing."""
    model, backend, _ = start_model(config, ranks)
    trained = trained_parameters(model)
    gradients = backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    optimizer = build_optimizer(backend.updated(trained), config.optim)
    start_adapters(model, config, backend, restores=False, say=_nothing)
    settings = config.train
    assert settings.max_steps is not None
    loader = StepLoader(
        rows,
        global_batch=settings.global_batch,
        micro_batch=settings.micro_batch,
        rank=ranks.rank,
        world=ranks.world,
        seed=settings.seed,
        shuffle=False,
    )
    trial = Trial(
        model,
        backend,
        optimizer,
        gradients,
        loader=loader,
        eval_loader=None,
        progress=Progress(),
        total_steps=settings.max_steps,
        reporter=reporter,
        config=config,
        hooks=Hooks(save=_nothing, save_last=_nothing, publish_best=_nothing),
    )
    return Trainer(model, backend, Control(ranks, save_minutes=None), [trial]), trial
