"""Run what a test asks for on one path of the CPU: `python -m support.path_step steps|runs JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distlora.parallel import Backend
from distlora.planner.memory.device import device_bytes
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from distlora.training import worker
from distlora_kernels import processor
from support.memory_steps import measure_step
from support.plan_inputs import cpu_machine
from support.runs import SINGLE
from support.small_models import config_with


def step(sections: dict[str, Any]) -> list[int]:
    """Return planned and measured bytes of a step with these settings."""
    config = config_with({}, sections)
    found = measure_step([config], SINGLE)
    plan = device_bytes(Workload.of(config), model_in(Path(config.model.path)), cpu_machine(1))
    return [plan.peak, found.peak]


def main(task: str, request: str) -> None:
    """Measure each step (its settings) or train each run (its folder and free bytes). Print the path, as JSON."""
    if task == "runs":
        for run_dir, free in json.loads(request):
            Backend.free_bytes = lambda self, free=free: free  # type: ignore[method-assign, misc]
            worker.run(Path(run_dir), SINGLE)
    found = [step(sections) for sections in json.loads(request)] if task == "steps" else []
    print(json.dumps({"path": processor.path(), "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
