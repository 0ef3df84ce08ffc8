"""Trace a token of a model of any size on the pretended GPU: launches, operators, host waits and peak memory.

    PRETEND_CUDA=shapes python -m pretend_cuda.start trace_token OUT.json CELL

CELL is JSON: {"model": a short name of plan_inputs.py, "rows": that decode together, "tokens": of their prompts}. All
rows have one prompt. What is traced is the fourth token.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from distlora.generation.engine import Engine, _Batch
from distlora.generation.sampling import Request
from distlora.training import setup
from pretend_cuda import device, launches, trace_step
from pretend_cuda.trace_step import load_nothing, started

TOKENS = 4


def traced(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what a token of each row launches, waits for and allocates."""
    setup.load_base = load_nothing
    found: dict[str, Any] = {}
    run_rows, calls = _Batch._run_rows, Counter[str]()

    def recorded(batch: _Batch) -> None:
        calls["rows"] += 1
        if calls["rows"] < TOKENS - 1:  # The first token is the prompt's.
            return run_rows(batch)
        gpu = batch._device
        torch.ops.pretend_cuda.take_counts()
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        with device.recording():
            run_rows(batch)
        operators = Counter(torch.ops.pretend_cuda.take_counts()) + device.python_operators
        found["kernels"] = dict(Counter(each.kernel for each in launches.recorded))
        found["operators"] = {name.removeprefix("aten::"): count for name, count in operators.items()}
        found["waits"], found["temporary"] = dict(device.host_waits), torch.cuda.max_memory_allocated(gpu) - before

    _Batch._run_rows = recorded  # type: ignore[assignment,method-assign]
    with tempfile.TemporaryDirectory() as folder:
        _, trainer = started(Path(folder), {"model": cell["model"], "ranks": 1, "tokens": cell["tokens"]})
        requests = [Request([1] * cell["tokens"], seed, TOKENS) for seed in range(cell["rows"])]
        Engine(trainer.model, trainer.backend, compiled=False, resident=cell.get("resident", True)).run(requests)
        assert calls["rows"] == TOKENS - 1
        return {"layers": len(trainer.model.blocks), **found}


def main() -> None:
    trace_step.main(traced, __doc__)
