"""Compare the calculated partial sums of the adapter kernels on a GPU with what their launches allocate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd.profiler import profile

from distlora.parallel import integrity
from distlora.planner.memory import layer, step
from distlora.planner.memory.layer import parts_of_db, parts_over_rows
from distlora_kernels import dropout, nf4, skinny_launch
from distlora_kernels.skinny import skinny_dy, skinny_grad

TOKENS, INPUTS, OUTPUTS = 320, 200, 328


def allocated(run: Callable[[], object]) -> list[int]:
    """Bytes of every tensor that a call allocates."""
    with profile(use_kineto=True, profile_memory=True) as profiled:
        run()
    assert profiled.kineto_results is not None
    events = profiled.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("rank", [16, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (8, 48))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_parts_of_adapters_gradients_are_as_large_as_is_calculated(
    dtype: torch.dtype, rank: int, triton_device: torch.device
) -> None:
    tensors = ((TOKENS, OUTPUTS), (OUTPUTS, rank), (TOKENS, rank), (TOKENS, INPUTS))
    dy, b, xa, x = (torch.randn(shape, dtype=dtype, device=triton_device) for shape in tensors)
    once = parts_of_db(TOKENS, OUTPUTS, rank, dtype.itemsize)
    assert (once is None) == (rank == 48)
    of_db = parts_over_rows(TOKENS, OUTPUTS, rank, dtype.itemsize) if once is None else once
    assert of_db in allocated(lambda: skinny_dy(dy, b, xa, scale=1.0))
    assert parts_over_rows(TOKENS, INPUTS, rank, dtype.itemsize) in allocated(lambda: skinny_grad(xa, x))


def test_bounds_of_what_is_made_at_once_are_those_of_the_code_that_makes_it() -> None:
    assert layer._COUNTERS == {"cpu": dropout._CPU_COUNTERS, "cuda": dropout._GPU_COUNTERS}
    assert layer._PARTS_BYTES == skinny_launch.MOST_PARTS_BYTES
    assert layer._RANK_READ_ONCE == skinny_launch._LARGEST_RANK_READ_ONCE
    assert 8 * integrity._LINES_AT_ONCE["cuda"] * integrity.LINE == step._CHECKED
    assert layer._BLOCK == nf4.BLOCK
