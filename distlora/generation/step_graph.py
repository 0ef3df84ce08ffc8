"""Replay decoding steps as CUDA graphs: the host launches one graph per token, not each kernel.

A graph has the shapes of its capture, so there is one for each number of rows (`padded_rows`) and each form of
sampling. Its inputs are copied into memory of its own. All else that it reads stays where it is while an engine runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distlora.generation.sampling import Form
from distlora_kernels.operands import scratch_buffer

CAPTURED = False
"""Whether the engine replays graphs on a GPU. Not yet run on one: only on the pretended device of the tests."""

Step = Callable[[Tensor, Tensor, Form], Tensor]
"""(numbers of the rows (C, N) fp64, tables (N, B) int64, form) -> (2, N) fp64; the host reads nothing."""


def padded_rows(count: int) -> int:
    """Return the rows of the graph that runs `count` rows: the next power of 2."""
    return 1 << (count - 1).bit_length()


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor]
    output: Tensor
    scratch: Tensor
    """Dequantized weights of the capture's stream; kept, because a later step may want a larger buffer."""


class StepGraphs:
    """The graphs of a step. They are deleted with it."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, Form], _Captured] = {}

    def __call__(self, numbers: Tensor, tables: Tensor, form: Form) -> Tensor:
        """Run the step. The result is valid until the next call."""
        key = numbers.shape[1], form
        if key not in self._captured:
            return self._capture(key, (numbers.clone(), tables.clone()))
        captured = self._captured[key]
        for static, new in zip(captured.inputs, (numbers, tables), strict=True):
            static.copy_(new)
        captured.graph.replay()
        return captured.output

    def _capture(self, key: tuple[int, Form], inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Run the step, then capture it: the run compiles kernels and allocates what outlives the step."""
        here, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result, scratch = self._step(*inputs, key[1]), scratch_buffer(self._device)
        here.wait_stream(self._stream)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = self._step(*inputs, key[1])
        self._captured[key] = _Captured(graph, inputs, output, scratch)
        return result
