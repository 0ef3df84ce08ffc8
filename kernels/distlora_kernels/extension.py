"""Choose where a base product takes the adapter's term as further columns of its operands. Imports no torch.

    y  = [x | x A^T] [W | s B]^T       in place of s (x A^T) B^T in memory, to which the product adds x W^T
    dX = [dY | dxa] [W ; A]            A is further rows of W

This saves the launch that writes the term; reading it again is counted as hidden behind the product. It costs the write
of a copy of x, or of a dY, with room behind its rows (the projection reads them anyway), and 64 more steps of the
product's inner loop. lora_gpu.py chooses by this file, and the planner counts by it without a GPU.
"""

from __future__ import annotations

import math

COLUMNS = 64
"""Columns that a product sums at a time; rows with room for projections are padded to a multiple: 128 bytes."""
_FLOPS_PER_BYTE = 250
"""Of an H100: 750 TFLOP/s over 3.0 TB/s. An A100 and a B200 have fewer, which favours the copy a little less."""
_LAUNCH_BYTES = 9e6
"""Bytes of memory traffic in the time of a launch: 3 us at 3.0 TB/s."""


def padded(rank: int) -> int:
    """Return the columns of room for projections of `rank` columns."""
    return -(-rank // COLUMNS) * COLUMNS


def extends(m: int, *, written: int, copied: int, rank: int, products: int = 1, itemsize: int) -> bool:
    """Return whether to extend products of M rows, whose adapters have `rank` columns together.

    Args:
        m: Rows M.
        written: Columns of the products' results: of every output in forward, of x in backward.
        copied: Columns of the operand that is copied: of x in forward, of one output in backward.
        rank: Columns of all projections that are side by side.
        products: Launches that are saved.
        itemsize: Bytes of an element. Products of 4 bytes take too long for further columns.
    """
    saved = itemsize * m * written + products * _LAUNCH_BYTES
    longer = 2 * m * padded(rank) * written / _FLOPS_PER_BYTE
    return itemsize == 2 and saved > itemsize * m * copied + longer


def carrier(m: int, features: int, outs: dict[int, int], rank: int, itemsize: int) -> int | None:
    """Return the key of the output whose gradient is copied for dX (M, `features`); None if that does not pay.

    `outs` has the columns of the outputs that can be copied.
    """
    key = min(outs, key=lambda key: outs[key], default=None)
    if key is None or not extends(m, written=features, copied=outs[key], rank=rank, itemsize=itemsize):
        return None
    return key


def scratch_numel(shape: tuple[int, ...]) -> int:
    """Return the elements of scratch memory for a weight; one (O, I) has room for projections of up to 64 columns."""
    return math.prod(shape) + (COLUMNS * max(shape) if len(shape) == 2 else 0)
