"""Which way a packed weight is multiplied: dequantized once into a scratch and given to a library GEMM, or decoded
inside the product (fused.py).

Every number here is predicted, not measured: the cost model of a weight, in ps (10^-12 s), is
    scratch   2.516 B / bandwidth + max(2 B / bandwidth, 2 M flop / rate)
    fused     ceil(M / rows) * (6.5 to 11 instructions / issue rate + 2 rows flop / rate), not overlapped
with rows = what one program of fused_triton.py takes (128 on sm_90, else 64) and rates at 85 % of the data sheet's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from distlora_kernels import fused
from distlora_kernels.fused_tiles import capability
from distlora_kernels.operands import FrozenWeight

Variant = Literal["scratch", "fused"]

# Compute capability -> the most rows M for which the fused product is taken.
_MOST_ROWS = {
    # A100, 1.9 TB/s, 270 TF/s: at 64 rows 1.2 against 2.4, at 128 a tie.
    (8, 0): 64,
    # A10, 0.6 TB/s, 60 TF/s: at 128 rows 5.8 against 7.9, at 256 11.7 against 12.7.
    (8, 6): 128,
    # RTX 4090, 0.95 TB/s, 150 TF/s, L40S alike: at 256 rows 4.5 against 6.0, at 512 a tie.
    (8, 9): 256,
    # H100, 3.0 TB/s, 700 TF/s: at 128 rows 0.7 against 1.5, at 256 1.4 against 1.6, at 384 2.1 against 1.9.
    (9, 0): 256,
    # B200, 7.5 TB/s, 1700 TF/s: at 64 rows 0.3 against 0.6, at 128 0.6 against 0.6.
    (10, 0): 64,
}
_MOST_ROWS_ELSEWHERE = 64
"""Up to it dequantizing costs more than decoding on every card above."""

_forced: Variant | None = None


def by_table(capability: tuple[int, int], m: int, o: int, i: int) -> Variant:
    """The variant for M rows of a packed weight (O, I). Both costs are proportional to O I, so only M decides."""
    if not fused.supports((o, i)):
        return "scratch"
    return "fused" if m <= _MOST_ROWS.get(capability, _MOST_ROWS_ELSEWHERE) else "scratch"


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
