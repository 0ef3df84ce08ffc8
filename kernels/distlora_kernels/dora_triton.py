"""Run dora.py's ops in Triton: norms of W + s B A, absmax of scaled rows, column sums of dy * y.

No atomics: the order of each sum depends on shapes only. Predicted costs (H100 at 3 TB/s, not measured):
- norms read 2 (O, R) and (R, R): 4 MiB at O = 8192, R = 64, less than a launch;
- the gradient reads dy and y once, 268 MB at M = O = 8192 in bf16: 90 us; partial sums add 0.8 %.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlora_kernels import nf4_triton
from distlora_kernels.reference import BLOCK

NORM_ROWS = 32
"""Out features per program of dora_norms."""
GRADIENT_ROWS, GRADIENT_COLUMNS = 16, 128
"""Tile of the gradient: 256 contiguous bytes of a row in bf16."""
STRIPE_ROWS = 256
"""Rows that one program sums. Fixed, so that the order of a sum is the same on every GPU."""
ABSMAX_BLOCKS = 1024
"""Absmax values per program of scaled_absmax."""
NUM_WARPS = 4


@triton.jit(do_not_specialize_on_alignment=["group_scale_ptr", "offset_ptr"])
def scaled_absmax_kernel(
    scales_ptr,
    group_scale_ptr,
    offset_ptr,
    map_ptr,
    factor_ptr,
    out_ptr,
    blocks,
    rows,
    blocks_of_a_row,
    BLOCKS: tl.constexpr,
):
    """Compute out[block] = absmax[block] * factor[row]; without group_scale_ptr `scales` holds the absmax."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    held = block < blocks
    scale = tl.load(scales_ptr + block, mask=held, other=0)
    if group_scale_ptr is None:
        absmax = scale
    else:
        group_scale = tl.load(group_scale_ptr + (block >> 8), mask=held, other=0.0)
        absmax = tl.load(map_ptr + scale.to(tl.int32)) * group_scale + tl.load(offset_ptr)
    row = block // blocks_of_a_row
    # Padding of the last group belongs to no row.
    factor = tl.load(factor_ptr + row, mask=row < rows, other=0.0)
    tl.store(out_ptr + block, absmax * factor, mask=held)


def scaled_absmax(parts: list[Tensor], rows: int, columns: int, factor: Tensor) -> Tensor:
    """Return the absmax (G, 256) fp32 of a quantized weight, each times its row's factor; padding is 0."""
    scales = parts[1].contiguous()
    group_scale = offset = dynamic_map = None
    if len(parts) == 4:
        group_scale, offset, dynamic_map = parts[2], parts[3], nf4_triton.dynamic_map(scales.device)
    out = torch.empty(scales.shape, dtype=torch.float32, device=scales.device)
    scaled_absmax_kernel[(triton.cdiv(out.numel(), ABSMAX_BLOCKS),)](
        scales,
        group_scale,
        offset,
        dynamic_map,
        factor,
        out,
        out.numel(),
        rows,
        columns // BLOCK,
        BLOCKS=ABSMAX_BLOCKS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # The contract rounds absmax twice.
    )
    return out


@triton.jit
def norms_kernel(
    squares_ptr, wa_ptr, gram_ptr, b_ptr, out_ptr, rows, rank, scale, ROWS: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """Compute out[row] = sqrt(squares[row] + 2 scale <wa[row], b[row]> + scale^2 <b[row] gram, b[row]>).

    Sums go over RANK columns at a time.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = row < rows
    cross = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, rank, RANK):
        column = start + tl.arange(0, RANK)
        mask = held[:, None] & (column < rank)[None, :]
        at = row[:, None] * rank + column[None, :]
        b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
        cross += tl.sum(tl.load(wa_ptr + at, mask=mask, other=0.0).to(tl.float32) * b, axis=1)
        product = tl.zeros((ROWS, RANK), tl.float32)
        for inner in range(0, rank, RANK):
            k = inner + tl.arange(0, RANK)
            left = tl.load(
                b_ptr + row[:, None] * rank + k[None, :], mask=held[:, None] & (k < rank)[None, :], other=0.0
            )
            right = tl.load(
                gram_ptr + k[:, None] * rank + column[None, :],
                mask=(k < rank)[:, None] & (column < rank)[None, :],
                other=0.0,
            )
            # ieee: TF32 would keep 10 bits of fp32 masters.
            product = tl.dot(left.to(tl.float32), right, product, input_precision="ieee")
        square += tl.sum(product * b, axis=1)
    squares = tl.load(squares_ptr + row, mask=held, other=0.0)
    total = squares + (2.0 * scale * cross + scale * scale * square)
    # Not tl.maximum, which turns NaN into 0. The root is correctly rounded, as in initial_magnitude.
    tl.store(out_ptr + row, tl.sqrt_rn(tl.where(total < 0.0, 0.0, total)), mask=held)


def dora_norms(row_norms_squared: Tensor, wa: Tensor, gram: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return reference.dora_norms."""
    rows, rank = b.shape
    out = torch.empty(rows, dtype=torch.float32, device=b.device)
    grid = (triton.cdiv(rows, NORM_ROWS),)
    norms_kernel[grid](
        row_norms_squared,
        wa,
        gram,
        b,
        out,
        rows,
        rank,
        scale,
        ROWS=NORM_ROWS,
        RANK=rank_tile(rank),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return out


def rank_tile(rank: int) -> int:
    """Return how many ranks are loaded at once; of a rank that is no multiple of 16, 32 of them would spill."""
    return 32 if rank > 16 and rank % 16 == 0 else 16


@triton.jit
def stripe_kernel(
    dy_ptr,
    y_ptr,
    partial_ptr,
    rows,
    columns,
    STRIPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute partial[stripe, column] = sum over the stripe's rows of dy * y."""
    stripe = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # The stripe's offset is int64, as outputs may exceed 2^31 elements; offsets within it fit int32.
    first = stripe.to(tl.int64) * STRIPE * columns
    left = tl.minimum(rows - stripe * STRIPE, STRIPE)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, STRIPE, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < left)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        dy = tl.load(dy_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + first + at, mask=mask, other=0.0).to(tl.float32)
        total += dy * y
    tl.store(partial_ptr + stripe.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


@triton.jit
def gradient_kernel(partial_ptr, magnitude_ptr, out_ptr, stripes, columns, COLUMNS: tl.constexpr):
    """Compute out[column] = sum over stripes of partial[stripe, column] / magnitude; 0 where that is 0."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    held = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for stripe in range(stripes):
        total += tl.load(partial_ptr + tl.cast(stripe, tl.int64) * columns + column, mask=held, other=0.0)
    magnitude = tl.load(magnitude_ptr + column, mask=held, other=1.0)
    quotient = tl.div_rn(total, tl.where(magnitude == 0.0, 1.0, magnitude))
    tl.store(out_ptr + column, tl.where(magnitude == 0.0, 0.0, quotient), mask=held)


def magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    """Return reference.magnitude_gradient."""
    rows, columns = dy.shape
    stripes = triton.cdiv(rows, STRIPE_ROWS)
    partial = torch.empty(stripes, columns, dtype=torch.float32, device=dy.device)
    # Neighbouring programs read neighbouring columns of the same rows.
    stripe_kernel[(triton.cdiv(columns, GRADIENT_COLUMNS), stripes)](
        dy,
        y,
        partial,
        rows,
        columns,
        STRIPE=STRIPE_ROWS,
        ROWS=GRADIENT_ROWS,
        COLUMNS=GRADIENT_COLUMNS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return add_stripes(partial, magnitude)


def add_stripes(partial: Tensor, magnitude: Tensor) -> Tensor:
    """Return the sum over the stripes (stripes, O) fp32, divided by the magnitude: (O,)."""
    stripes, columns = partial.shape
    out = torch.empty(columns, dtype=torch.float32, device=partial.device)
    gradient_kernel[(triton.cdiv(columns, GRADIENT_COLUMNS),)](
        partial, magnitude, out, stripes, columns, COLUMNS=GRADIENT_COLUMNS, num_warps=NUM_WARPS, enable_fp_fusion=True
    )
    return out
