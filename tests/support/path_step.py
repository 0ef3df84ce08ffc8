"""Measure a step's memory beside its plan, on one path: `python -m support.path_step MODEL COMPILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from distlora.parallel import Ranks
from distlora.planner.memory.device import device_bytes
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from distlora_kernels import processor
from support.memory_steps import measure_step
from support.plan_inputs import cpu_machine
from support.small_models import config_with


def main(folder: str, compiles: str) -> None:
    """Print the path, and planned and measured bytes of a step, as JSON."""
    settings = {
        "model": {"path": folder},
        "data": {"path": "none.jsonl", "sequence_length": 256},
        "adapter": {"target_modules": "all-linear", "r": 8},
        "quant": {"cache": False},
        "train": {"micro_batch": 2, "global_batch": 2, "compile": compiles == "true"},
    }
    config = config_with({}, settings)
    found = measure_step([config], Ranks(0, 1, torch.device("cpu"), None))
    plan = device_bytes(Workload.of(config), model_in(Path(folder)), cpu_machine(1))
    print(json.dumps({"path": processor.path(), "planned": plan.peak, "measured": found.peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
