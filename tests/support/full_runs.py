"""Runs of full fine-tuning, and their losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distlora.config import Config
from support.small_models import make_run

FULL: dict[str, Any] = {"adapter": {"method": "full"}, "quant": {"method": "none"}}


def prepare(run_dir: Path, folders: Path, model: str = "llama", **train_settings: Any) -> Config:
    return make_run(run_dir, folders, model, **FULL, train=train_settings)


def losses_of(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] if "loss" in line else line["eval_loss"] for line in metrics]
