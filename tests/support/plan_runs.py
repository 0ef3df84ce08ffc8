"""Runs whose operations the planner counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distlora.config import Config
from support.family_models import config_for

LENGTH, GLOBAL_BATCH = 40, 6


def run_of(folder: Path, **sections: dict[str, Any]) -> Config:
    data = {"path": "none.jsonl", "sequence_length": LENGTH}
    return config_for(folder, data=data, **sections)


LORA: dict[str, Any] = {"adapter": {"target_modules": "all-linear", "r": 4, "rank_pattern": {"o_proj": 3}}}
