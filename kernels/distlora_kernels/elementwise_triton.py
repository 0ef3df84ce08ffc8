"""Run elementwise.py's operations on a GPU: each reads its operands and writes its result once.

Numbers are widened to fp32 as they are loaded and rounded to the dtype where the definitions round them. No atomics: a
row's sum has one order, given by its length. A tensor may exceed 2^31 elements: row offsets are int64.

Letters as in elementwise.py: M rows, N columns, B rows of the batch, K heads, T tokens, E size of a head, R rotated
columns of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

NORM_COLUMNS, LONG_ROW_COLUMNS = 16384, 4096
"""Columns that a norm keeps in registers, and columns that it reads at once of a longer row, which it reads twice."""
NORM_TILE = 1024
"""Elements of a norm's program where a row is shorter: several rows together."""
GATE_COLUMNS = 1024
"""Columns per program of a gated product: one load of 16 bytes per thread and operand in bf16."""
ROTARY_PAIRS = 1024
"""Pairs of columns that a program rotates at once."""
LOSS_COLUMNS = 8192
"""Logits that a program reads at once."""
NUM_WARPS = 4
_EXACT = {"enable_fp_fusion": False}
"""The rotary embedding rounds each product, in fp32 too."""


@triton.jit
def _rounded(x, pointer):
    """Round to the dtype that `pointer` points to, and widen again."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, inverse_ptr, rows, columns, eps, PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Compute y and inverse[row] = 1 / rms(x[row]). `WHOLE`: COLUMNS hold a row, which is then read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = (row < rows)[:, None]
    end = COLUMNS if WHOLE else columns
    x = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(x_ptr + row[:, None] * columns + column, mask=held & (column < columns), other=0.0).to(tl.float32)
        squares += x * x
    inverse = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / columns + eps)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)
    for start in range(0, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = held & (column < columns)
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        if not WHOLE:
            x = tl.load(x_ptr + row[:, None] * columns + column, mask=mask, other=0.0).to(tl.float32)
        normal = x * inverse[:, None]
        y = normal * (1.0 + weight) if PLUS_ONE else weight * _rounded(normal, y_ptr)
        tl.store(y_ptr + row[:, None] * columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_gradient(dy_ptr, x_ptr, weight_ptr, at, column, held, columns, PLUS_ONE: tl.constexpr):
    """Return the gradient of x / rms(x), and x."""
    mask = held & (column < columns)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return dy * (1.0 + weight) if PLUS_ONE else _rounded(dy * weight, dy_ptr), x


@triton.jit
def norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, inverse_ptr, dx_ptr, rows, columns, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Compute dx = g inverse - x inverse^3 <g, x> / N, where g is the gradient of x / rms(x)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = (row < rows)[:, None]
    end = COLUMNS if WHOLE else columns
    g, x = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        at = row[:, None] * columns + column
        g, x = _norm_gradient(dy_ptr, x_ptr, weight_ptr, at, column, held, columns, PLUS_ONE)
        products += g * x
    inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)
    shift = tl.sum(products, axis=1) * inverse * inverse * inverse / columns
    for start in range(0, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        at = row[:, None] * columns + column
        if not WHOLE:
            g, x = _norm_gradient(dy_ptr, x_ptr, weight_ptr, at, column, held, columns, PLUS_ONE)
        dx = g * inverse[:, None] - x * shift[:, None]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=held & (column < columns))


def norm_tile(columns: int) -> dict[str, int | bool]:
    """Return the tile and the number of warps: 8 or 16 elements per thread, 32 in the longest rows that stay whole."""
    if columns > NORM_COLUMNS:
        return {"ROWS": 1, "COLUMNS": LONG_ROW_COLUMNS, "WHOLE": False, "num_warps": 8}
    padded = triton.next_power_of_2(columns)
    rows = max(1, NORM_TILE // padded)
    num_warps = min(16, max(NUM_WARPS, padded // 512))
    return {"ROWS": rows, "COLUMNS": padded, "WHOLE": True, "num_warps": num_warps}


def norm_forward(
    x: Tensor, weight: Tensor, y: Tensor, inverse: Tensor, rows: int, columns: int, eps: float, plus_one: bool
) -> None:
    """Write reference_rms_norm of x to y, and 1 / rms(x) to inverse. All are contiguous."""
    tile = norm_tile(columns)
    norm_forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, weight, y, inverse, rows, columns, eps, PLUS_ONE=plus_one, **tile
    )


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, dx: Tensor, rows: int, columns: int, plus_one: bool
) -> None:
    """Write the gradient of x to dx. All are contiguous."""
    tile = norm_tile(columns)
    norm_backward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        dy, x, weight, inverse, dx, rows, columns, PLUS_ONE=plus_one, **tile
    )


@triton.jit
def _tanh_argument(x):
    return 0.7978845608 * (x + 0.044715 * x * x * x)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activated(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1.0 + _tanh(_tanh_argument(x)))
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _slope(x, GELU: tl.constexpr):
    """Return the derivative of _activated."""
    if GELU:
        t = _tanh(_tanh_argument(x))
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608 * (1.0 + 3.0 * 0.044715 * x * x)
    s = 1.0 / (1.0 + tl.exp(-x))
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def gate_forward_kernel(
    gate_ptr, up_ptr, y_ptr, columns, stride, programs_of_a_row, GELU: tl.constexpr, COLUMNS: tl.constexpr
):
    """Compute y = round(act(gate)) * up."""
    row = (tl.program_id(0) // programs_of_a_row).to(tl.int64)
    column = tl.program_id(0) % programs_of_a_row * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    gate = tl.load(gate_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    y = _rounded(_activated(gate, GELU), y_ptr) * up
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, columns, stride, programs_of_a_row, GELU: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the gradients of gate and up over them."""
    row = (tl.program_id(0) // programs_of_a_row).to(tl.int64)
    column = tl.program_id(0) % programs_of_a_row * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    dy = tl.load(dy_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    d_up = dy * _rounded(_activated(gate, GELU), up_ptr)
    d_gate = _rounded(dy * up, gate_ptr) * _slope(gate, GELU)
    tl.store(up_ptr + row * stride + column, d_up.to(up_ptr.dtype.element_ty), mask=mask)
    tl.store(gate_ptr + row * stride + column, d_gate.to(gate_ptr.dtype.element_ty), mask=mask)


def gate_forward(gate: Tensor, up: Tensor, y: Tensor, rows: int, columns: int, stride: int, gelu: bool) -> None:
    """Write reference_gated to y, contiguous; rows of gate and up are `stride` apart."""
    blocks = triton.cdiv(columns, GATE_COLUMNS)
    gate_forward_kernel[(rows * blocks,)](
        gate, up, y, columns, stride, blocks, GELU=gelu, COLUMNS=GATE_COLUMNS, num_warps=NUM_WARPS
    )


def gate_backward(dy: Tensor, gate: Tensor, up: Tensor, rows: int, columns: int, stride: int, gelu: bool) -> None:
    """Write the gradients of gate and up over them, from dy, contiguous."""
    blocks = triton.cdiv(columns, GATE_COLUMNS)
    gate_backward_kernel[(rows * blocks,)](
        dy, gate, up, columns, stride, blocks, GELU=gelu, COLUMNS=GATE_COLUMNS, num_warps=NUM_WARPS
    )


@triton.jit
def _rotate_heads(
    token_ptr, heads, head_stride, cos_low, cos_high, sin_low, sin_high, HALF: tl.constexpr,
    HEADS: tl.constexpr, PADDED: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """Rotate the heads of one token in place."""
    column = tl.arange(0, PADDED)[None, :]
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS))[:, None]
        mask = (head < heads) & (column < HALF)
        low_ptr = token_ptr + head.to(tl.int64) * head_stride + column
        low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(low_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
        of_low, of_high = (high * sin_high, -low * sin_low) if BACK else (-high * sin_low, low * sin_high)
        new_low = _rounded(low * cos_low, token_ptr) + _rounded(of_low, token_ptr)
        new_high = _rounded(high * cos_high, token_ptr) + _rounded(of_high, token_ptr)
        tl.store(low_ptr, new_low.to(token_ptr.dtype.element_ty), mask=mask)
        tl.store(low_ptr + HALF, new_high.to(token_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_heads, k_heads, q_batch_stride, q_head_stride, q_token_stride,
    k_batch_stride, k_head_stride, k_token_stride, table_batch_stride, HALF: tl.constexpr, HEADS: tl.constexpr,
    PADDED: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """Rotate all heads of one token; HALF = R / 2 columns are rotated with the HALF after them."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, PADDED)[None, :]
    mask = column < HALF
    table = row * table_batch_stride + token * (2 * HALF) + column
    cos_low = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + table + HALF, mask=mask, other=0.0).to(tl.float32)
    q_token = q_ptr + row * q_batch_stride + token * q_token_stride
    k_token = k_ptr + row * k_batch_stride + token * k_token_stride
    _rotate_heads(q_token, q_heads, q_head_stride, cos_low, cos_high, sin_low, sin_high, HALF, HEADS, PADDED, BACK)
    _rotate_heads(k_token, k_heads, k_head_stride, cos_low, cos_high, sin_low, sin_high, HALF, HEADS, PADDED, BACK)


def rotary_tile(turned: int, heads: int) -> dict[str, int]:
    """Return the tile of a rotary embedding of `turned` columns in each of so many heads."""
    padded = triton.next_power_of_2(turned // 2)
    tile = min(triton.next_power_of_2(heads), max(1, ROTARY_PAIRS // padded))
    return {"HALF": turned // 2, "HEADS": tile, "PADDED": padded}


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """Rotate q and k (B, K, T, E) in place as reference_rotated does, or back, in one launch.

    Their last dimension and the tables are contiguous.
    """
    batch, heads, tokens, _ = q.shape
    table_stride, tile = 0 if cos.shape[0] == 1 else cos.stride(0), rotary_tile(cos.shape[-1], heads)
    rotate_kernel[(tokens, batch)](
        q, k, cos, sin, heads, k.shape[1], *q.stride()[:3], *k.stride()[:3], table_stride, **tile, BACK=back,
        num_warps=NUM_WARPS, **_EXACT,
    )  # fmt: skip


@triton.jit
def cross_entropy_kernel(logits_ptr, labels_ptr, losses_ptr, columns, COLUMNS: tl.constexpr):
    """Compute losses[row] and write the gradient over a row of logits: one pass for the sum, one to write."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * columns
    label = tl.load(labels_ptr + row)
    column = tl.arange(0, COLUMNS)
    valid = (label >= 0) & (label < columns)
    if valid:
        of_label = tl.load(row_ptr + label).to(tl.float32)
        most = tl.full((), float("-inf"), tl.float32)
        sums = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, columns, COLUMNS):
            logits = tl.load(row_ptr + start + column, mask=start + column < columns, other=float("-inf"))
            logits = logits.to(tl.float32)
            larger = tl.maximum(most, tl.max(logits, axis=0))
            # Of -inf alone exp would be NaN.
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            sums = sums * tl.exp(most - shift) + tl.exp(logits - shift)
            most = larger
        log_sum = tl.log(tl.sum(sums, axis=0))
        tl.store(losses_ptr + row, log_sum - (of_label - most))
        tl.debug_barrier()  # All threads have read the label's logit before one writes over it.
        for start in range(0, columns, COLUMNS):
            mask = start + column < columns
            logits = tl.load(row_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp(logits - most - log_sum) - tl.where(start + column == label, 1.0, 0.0)
            tl.store(row_ptr + start + column, gradient.to(logits_ptr.dtype.element_ty), mask=mask)
    else:
        nothing = tl.where(label < 0, 0.0, float("nan"))
        tl.store(losses_ptr + row, nothing)
        for start in range(0, columns, COLUMNS):
            gradient = tl.zeros((COLUMNS,), tl.float32) + nothing
            tl.store(row_ptr + start + column, gradient.to(logits_ptr.dtype.element_ty), mask=start + column < columns)


def loss_tile(columns: int) -> dict[str, int]:
    """Return the tile of a row of logits, and the number of warps."""
    tile = min(triton.next_power_of_2(columns), LOSS_COLUMNS)
    return {"COLUMNS": tile, "num_warps": max(NUM_WARPS, tile // 512)}


def cross_entropy(logits: Tensor, labels: Tensor, losses: Tensor, rows: int, columns: int) -> None:
    """Write reference_cross_entropy to losses and over the logits; all are contiguous."""
    cross_entropy_kernel[(rows,)](logits, labels, losses, columns, **loss_tile(columns))
