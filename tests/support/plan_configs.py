"""Configs whose steps the planner times."""

from __future__ import annotations

from typing import Any

from distlora.config import Config
from support.small_models import config_with


def config_of(ranks: int, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "unset"},
        "data": {"path": "none.jsonl", "sequence_length": 2048},
        "adapter": {"target_modules": "all-linear"},
        "train": {"global_batch": 64},
        "cluster": {"gpus_per_node": ranks},
    }
    return config_with(base, sections)
