"""Which way a packed weight is multiplied: dequantized once into a scratch and given to a library GEMM, or decoded
inside the product (fused.py). few_rows.py says up to how many rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from distlora_kernels import fused
from distlora_kernels.few_rows import most_rows
from distlora_kernels.fused_tiles import capability
from distlora_kernels.operands import FrozenWeight

Variant = Literal["scratch", "fused"]

_forced: Variant | None = None


def by_table(capability: tuple[int, int], m: int, o: int, i: int) -> Variant:
    """The variant for M rows of a packed weight (O, I). Both costs are proportional to O I, so only M decides."""
    if not fused.supports((o, i)):
        return "scratch"
    return "fused" if m <= most_rows(capability) else "scratch"


def choose(rows: Tensor, weight: FrozenWeight) -> Variant:
    """The variant for rows (M, I), or (M, O) of a gradient, on their device.

    A dense weight has only one. fp32 goes to the library, as matrix instructions in fp32 precision are slow in Triton;
    so does fp64, which the fused product does not take.
    """
    if not weight.packed:
        return "scratch"
    if _forced is not None:
        return _forced
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return "scratch"
    return by_table(capability(rows.device), rows.shape[0], *weight.shape)


@contextlib.contextmanager
def forced(variant: Variant) -> Iterator[None]:
    """Within it every packed weight takes this variant: for benchmarks and tests."""
    global _forced
    assert _forced is None, f"the variant {_forced!r} is already forced"
    _forced = variant
    try:
        yield
    finally:
        _forced = None
