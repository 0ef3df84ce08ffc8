"""Our side: the trainer itself, as a worker of a run has it, over given rows and from a given adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.bench.peer_models import describe
from distlora.bench.step.turns import Turns
from distlora.bench.trial import Started
from distlora.config import Config
from distlora.config.file import build
from distlora.data.loader import PackedRows
from distlora.parallel import Ranks
from distlora.training.reporting.reporter import Reporter
from distlora.weights.peft_folder import read_peft_adapter

STEPS = 10**6
"""Of the run: more than anybody measures, at a constant learning rate."""


class Losses(Reporter):
    """Writes nothing and keeps the loss of the newest step."""

    def __init__(self, config: Config) -> None:
        super().__init__(Path(), config, rank=1, world=2, total_steps=STEPS, start_step=0)  # Only rank 0 writes.

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.newest = metrics["loss"]


def config_of(job: Mapping[str, Any], world: int) -> Config:
    adapter = read_peft_adapter(Path(job["adapter"])).settings
    sections: dict[str, Any] = {
        "model": {"path": job["model"]},
        "data": {"path": "none", "sequence_length": job["length"]},
        "adapter": adapter | {"init_from": job["adapter"]},
        "quant": {"method": job["base"], "cache": False},
        "train": {
            "checkpointing": job["checkpointing"],
            "global_batch": job["rows"],
            "micro_batch": job["rows"] // world,
            "max_steps": STEPS,
            "save_minutes": None,
            "compile": job["compile"],
        },
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup_ratio": 0.0},
        "tracker": {"name": "none"},
        "run_dir": "none",
    }
    return build(Config, sections)


def train(job: Mapping[str, Any], rows: PackedRows, ranks: Ranks, turns: Turns) -> None:
    """Until there are no more turns."""
    config = config_of(job, ranks.world)
    losses = Losses(config)
    trainer, trial = Started.of(config, ranks).trainer(rows, reporter=losses)
    trainer.begin([trial])
    turns.tell(ran=describe(trainer.model))
    for _ in turns:
        trainer.advance()
        turns.note(losses.newest)
