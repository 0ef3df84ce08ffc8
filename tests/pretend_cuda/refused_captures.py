"""Capture what a CUDA graph forbids on the pretended device, and write how each is refused.

PRETEND_CUDA=run python -m pretend_cuda.start refused_captures OUT.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

GPU = torch.device("cuda", 0)


def replayed(step: Callable[[Tensor], object]) -> str:
    """Capture a step of three ones and replay it; return the error, or what the ones have become."""
    values, graph = torch.ones(3, device=GPU), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(GPU)):
            step(values)
        values.fill_(5)
        graph.replay()
    except AssertionError as error:
        return str(error)
    return str(values.tolist())


def of_freed_memory(values: Tensor) -> None:
    """Read a tensor that is gone when the graph is replayed."""
    outside = torch.full((3,), 2.0, device=GPU)
    with torch.utils._python_dispatch._disable_current_modes():
        inside = outside.clone()
    values.add_(inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    numbers = torch.ones(3).pin_memory()
    cases: dict[str, Callable[[Tensor], object]] = {
        "nothing": lambda values: values.mul_(2),
        "temporary memory": lambda values: values.add_(values * 2),
        "a wait": lambda values: values.sum().item(),
        "a size": lambda values: values.nonzero(),
        "a copy from the host": lambda values: values.copy_(numbers, non_blocking=True),
        "a number from the host": lambda values: values.mul_(torch.tensor(2.0).to(GPU)),
        "a copy to the host": lambda values: numbers.copy_(values, non_blocking=True),
        "freed memory": of_freed_memory,
    }
    found = {name: replayed(step) for name, step in cases.items()}
    parser.parse_args().out.write_text(json.dumps(found, indent=1))
