"""Multiply with a quantized weight W (O, I), decoded inside the matrix product: x W^T and dy W in Triton.

The inner loop of forward is cheap because (instruction counts are in docs/benchmarks.md):
- a thread reads 16 bytes, 32 codes of one row, and looks the levels up one by one in a table of 16 fp32 values, which
  lie in 16 different banks of shared memory: a look-up by 32 lanes takes one cycle, against six with a table of 256
  pairs;
- W is the *left* operand of W x^T, and its k and its rows are renumbered so that the codes that a thread has read are
  those that the matrix instruction expects in its registers: W never passes through shared memory. A sum does not
  depend on the order of k, so x is renumbered alike; the rows are restored at the end. Where the renumbering does not
  fit an architecture, Triton moves data: slower, with the same result.

A second launch adds the parts of a split sum in a fixed order.

Letters: M rows, I in features, O out features, R rank, G groups, S parts of a split sum.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlora_kernels import nf4_triton
from distlora_kernels.dispatch import compute_capability
from distlora_kernels.reference import BLOCK

# The contract rounds absmax twice: no fused multiply-add.
_OPTIONS = {"enable_fp_fusion": False}
REDUCED = 1024
"""Outputs per program of the second launch."""


class TileConfig(NamedTuple):
    """Tile of a product: a program computes (rows, width) outputs, `depth` products of each at a time."""

    rows: int
    width: int
    depth: int
    warps: int
    stages: int
    programs: int
    """Programs that fit a multiprocessor at once; the sum is split for as many."""


HOPPER = (9, 0)
"""Compute capability of the H100 and H200, whose matrix instruction is wgmma."""

# Most rows of a configuration -> configuration; more rows take several programs. Chosen by compiling without spills and
# by the programs that fit (tests/tools/compiled_kernels.py); not measured.
LINEAR_HOPPER = {
    16: TileConfig(16, 128, 128, 8, 4, 2),
    32: TileConfig(32, 128, 128, 8, 4, 2),
    64: TileConfig(64, 128, 128, 8, 3, 1),
    128: TileConfig(128, 128, 128, 8, 3, 1),
}
# Other architectures have 99 KiB of shared memory; mma.sync reads all of x in each warp, so wide row tiles gain
# nothing.
LINEAR = {
    16: TileConfig(16, 64, 128, 4, 4, 3),
    32: TileConfig(32, 64, 128, 4, 3, 2),
    64: TileConfig(64, 128, 128, 8, 3, 1),
}
DX_HOPPER = {
    64: TileConfig(64, 128, 64, 4, 3, 2),
    128: TileConfig(128, 128, 64, 8, 3, 1),
}
"""Few rows use wgmma with 64 rows too: mma.sync on tiles of 16 rows needs more instructions per weight."""
DX = {
    16: TileConfig(16, 128, 32, 4, 4, 4),
    32: TileConfig(32, 128, 64, 4, 3, 2),
    64: TileConfig(64, 128, 64, 8, 3, 1),
    128: TileConfig(128, 128, 64, 8, 3, 1),
}


def linear_config(capability: tuple[int, int], m: int, dtype: torch.dtype) -> TileConfig:
    """Return the configuration of x W^T for M rows."""
    return _config(LINEAR_HOPPER if capability == HOPPER else LINEAR, LINEAR, m, dtype)


def dx_config(capability: tuple[int, int], m: int, dtype: torch.dtype) -> TileConfig:
    """Return the configuration of dy W for M rows."""
    return _config(DX_HOPPER if capability == HOPPER else DX, DX, m, dtype)


def _config(table: dict[int, TileConfig], smallest: dict[int, TileConfig], m: int, dtype: torch.dtype) -> TileConfig:
    if dtype == torch.float32:
        # No matrix instructions and operands twice as wide: larger tiles do not fit the registers.
        return smallest[16]
    return next((config for rows, config in table.items() if m <= rows), table[max(table)])


def k_width(capability: tuple[int, int], nested: bool) -> int:
    """Return how many neighbouring k the matrix instruction takes from one thread.

    It is 2, but Triton makes it 4 for mma.sync if bytes (the scales) are loaded for the operand. A wrong value costs
    time, not correctness.
    """
    return 4 if nested and capability != HOPPER else 2


def ranks_at_a_time(rank: int | None) -> int:
    """Return how many ranks of an adapter are taken at a time.

    Never 16: Triton gives loads of one shape one layout, so a tile of b would share the layout of the words of codes,
    and a thread would read 32 bytes of these instead of the 16 that the renumbering needs.
    """
    return 32 if rank is None or rank <= 32 else 64


@triton.jit
def _absmax(scales_ptr, scale_ptr, map_ptr, offset, block, mask):
    """Load the fp32 absmax of blocks; with scales_ptr compute fl(fl(map[scale] * group_scale) + offset)."""
    if scales_ptr is None:
        absmax = tl.load(scale_ptr + block, mask=mask, other=0.0)
    else:
        scale = tl.load(scales_ptr + block, mask=mask, other=0).to(tl.int32)
        group_scale = tl.load(scale_ptr + (block >> 8), mask=mask, other=0.0)
        absmax = tl.load(map_ptr + scale) * group_scale + offset
    return absmax


@triton.jit
def _decode(words, absmax, levels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Decode words (ROWS, COLUMNS / 8) int32 of 8 codes with absmax (ROWS, COLUMNS / 64) to (ROWS, COLUMNS)."""
    bits = words.to(tl.uint32, bitcast=True)
    # Byte 0 holds the first two codes, the first in the high nibble. join appends the fastest dim, so
    # the outermost join is of the two nibbles of a byte and the innermost of bytes b and b + 2.
    high = tl.join(
        tl.join((bits >> 4) & 15, (bits >> 20) & 15),
        tl.join((bits >> 12) & 15, bits >> 28),
    )
    low = tl.join(
        tl.join(bits & 15, (bits >> 16) & 15),
        tl.join((bits >> 8) & 15, (bits >> 24) & 15),
    )
    code = tl.reshape(tl.join(high, low), (ROWS * COLUMNS,)).to(tl.int32)
    # One-dim gathers are loads from shared memory in Triton 3.6 and 3.9; two-dim gathers are shuffles.
    level = tl.reshape(tl.gather(levels, code, 0), (ROWS, COLUMNS // 64, 64))
    return tl.reshape(level * absmax[:, :, None], (ROWS, COLUMNS)).to(dtype)


@triton.jit
def _renumber_k(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K_WIDTH: tl.constexpr):
    """Renumber the columns of (ROWS, COLUMNS).

    Each of the 4 lanes that share a row in the matrix instruction gets a contiguous quarter of the row's 128 columns.
    """
    quarters = tl.reshape(tile, (ROWS, COLUMNS // 128, 4, 32 // K_WIDTH, K_WIDTH))
    return tl.reshape(tl.permute(quarters, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))


@triton.jit
def _renumber_rows(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Renumber the rows: a warp reads groups of 8 rows that are apart, and the matrix instruction takes 16."""
    eights = tl.reshape(tile, (ROWS // (16 * WARPS), 2, WARPS, 8, COLUMNS))
    return tl.reshape(tl.permute(eights, (0, 2, 1, 3, 4)), (ROWS, COLUMNS))


@triton.jit
def _restore_rows(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Undo _renumber_rows."""
    eights = tl.reshape(tile, (ROWS // (16 * WARPS), WARPS, 2, 8, COLUMNS))
    return tl.reshape(tl.permute(eights, (0, 2, 1, 3, 4)), (ROWS, COLUMNS))


@triton.jit
def _store(result, y_ptr, addend_ptr, bias_ptr, row, column, M, N, part):
    """Store result (rows, columns) fp32 + addend (M, N) + bias (N,) into y (S, M, N); part 0 adds the two terms."""
    inside = (row < M)[:, None] & (column < N)[None, :]
    element = row.to(tl.int64)[:, None] * N + column[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < tl.where(part == 0, N, 0), other=0.0).to(tl.float32)
        result += bias[None, :]
    if addend_ptr is not None:
        inside_first = inside & (row < tl.where(part == 0, M, 0))[:, None]
        result += tl.load(addend_ptr + element, mask=inside_first, other=0.0).to(tl.float32)
    tl.store(y_ptr + part.to(tl.int64) * M * N + element, result.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["offset_ptr"])
def linear_kernel(
    x_ptr, codes_ptr, scales_ptr, scale_ptr, offset_ptr, map_ptr, levels_ptr,
    addend_ptr, xa_ptr, b_ptr, bias_ptr, y_ptr,
    M, OUT, IN, row_words, row_blocks, R, stride_xa, num_row_tiles, tiles_per_part,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr,
    WHOLE: tl.constexpr, K_WIDTH: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Compute y (S, M, O) = x W^T + xa b^T + addend + bias over part program_id(1) of I.

    WHOLE: I is a multiple of DEPTH.
    """
    part = tl.program_id(1)
    row = tl.program_id(0) % num_row_tiles * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(0) // num_row_tiles * WIDTH + tl.arange(0, WIDTH)
    row_inside, out_inside = (row < M)[:, None], (out < OUT)[:, None]
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    offset = tl.load(offset_ptr) if offset_ptr is not None else 0.0
    dtype = x_ptr.dtype.element_ty
    x_row_ptr = x_ptr + row.to(tl.int64)[:, None] * IN
    codes_row_ptr = codes_ptr.to(tl.pointer_type(tl.int32)) + out.to(tl.int64)[:, None] * row_words
    first_block = out.to(tl.int64)[:, None] * row_blocks
    total = tl.zeros((WIDTH, ROWS), tl.float32)
    for tile in tl.range(part * tiles_per_part, min((part + 1) * tiles_per_part, tl.cdiv(IN, DEPTH))):
        k = (tile * DEPTH + tl.arange(0, DEPTH))[None, :]
        word = (tile * (DEPTH // 8) + tl.arange(0, DEPTH // 8))[None, :]
        block = (tile * (DEPTH // 64) + tl.arange(0, DEPTH // 64))[None, :]
        if WHOLE:
            k_inside, word_inside, block_inside = row_inside, out_inside, out_inside
        else:
            k_inside, word_inside = row_inside & (k < IN), out_inside & (word < row_words)
            block_inside = out_inside & (block < row_blocks)
        absmax = _absmax(scales_ptr, scale_ptr, map_ptr, offset, first_block + block, block_inside)
        x = tl.load(x_row_ptr + k, mask=k_inside, other=0.0)
        words = tl.load(codes_row_ptr + word, mask=word_inside, other=0)
        w = _renumber_k(_decode(words, absmax, levels, WIDTH, DEPTH, dtype), WIDTH, DEPTH, K_WIDTH)
        w = _renumber_rows(w, WIDTH, DEPTH, WARPS)
        total = tl.dot(w, tl.trans(_renumber_k(x, ROWS, DEPTH, K_WIDTH)), total, input_precision="ieee")
    if xa_ptr is not None:
        for start in tl.range(0, tl.where(part == 0, R, 0), RANKS, num_stages=1):
            rank = (start + tl.arange(0, RANKS))[None, :]
            xa = tl.load(xa_ptr + row.to(tl.int64)[:, None] * stride_xa + rank, mask=row_inside & (rank < R), other=0.0)
            b = tl.load(b_ptr + out.to(tl.int64)[:, None] * R + rank, mask=out_inside & (rank < R), other=0.0)
            b = _renumber_rows(b, WIDTH, RANKS, WARPS)
            total = tl.dot(b, tl.trans(xa), total, input_precision="ieee")
    y = tl.trans(_restore_rows(total, WIDTH, ROWS, WARPS))
    _store(y, y_ptr, addend_ptr, bias_ptr, row, out, M, OUT, part)


@triton.jit(do_not_specialize_on_alignment=["offset_ptr"])
def dx_kernel(
    dy_ptr, codes_ptr, scales_ptr, scale_ptr, offset_ptr, map_ptr, levels_ptr, dxa_ptr, a_ptr, dx_ptr,
    M, OUT, IN, row_words, row_blocks, R, num_row_tiles, tiles_per_part,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute dx (S, M, I) = dy W + dxa a over part program_id(1) of O. WHOLE: I is a multiple of WIDTH.

    The sum runs over W's rows while its codes are contiguous along columns: tl.dot moves W through shared memory.
    """
    part = tl.program_id(1)
    row = tl.program_id(0) % num_row_tiles * ROWS + tl.arange(0, ROWS)
    column_tile = tl.program_id(0) // num_row_tiles
    column = column_tile * WIDTH + tl.arange(0, WIDTH)
    word = (column_tile * (WIDTH // 8) + tl.arange(0, WIDTH // 8))[None, :]
    block = (column_tile * (WIDTH // 64) + tl.arange(0, WIDTH // 64))[None, :]
    row_inside = (row < M)[:, None]
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    offset = tl.load(offset_ptr) if offset_ptr is not None else 0.0
    dtype = dy_ptr.dtype.element_ty
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    dy_row_ptr = dy_ptr + row.to(tl.int64)[:, None] * OUT
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in tl.range(part * tiles_per_part, min((part + 1) * tiles_per_part, tl.cdiv(OUT, DEPTH))):
        out = tile * DEPTH + tl.arange(0, DEPTH)
        out_inside = (out < OUT)[:, None]
        if WHOLE:
            word_inside, block_inside = out_inside, out_inside
        else:
            word_inside, block_inside = out_inside & (word < row_words), out_inside & (block < row_blocks)
        first = out.to(tl.int64)[:, None]
        absmax = _absmax(scales_ptr, scale_ptr, map_ptr, offset, first * row_blocks + block, block_inside)
        dy = tl.load(dy_row_ptr + out[None, :], mask=row_inside & (out < OUT)[None, :], other=0.0)
        words = tl.load(words_ptr + first * row_words + word, mask=word_inside, other=0)
        w = _decode(words, absmax, levels, DEPTH, WIDTH, dtype)
        total = tl.dot(dy, w, total, input_precision="ieee")
    if dxa_ptr is not None:
        for start in tl.range(0, tl.where(part == 0, R, 0), RANKS, num_stages=1):
            rank = start + tl.arange(0, RANKS)
            rank_inside = rank < R
            dxa = tl.load(
                dxa_ptr + row.to(tl.int64)[:, None] * R + rank[None, :],
                mask=row_inside & rank_inside[None, :],
                other=0.0,
            )
            a = tl.load(
                a_ptr + rank.to(tl.int64)[:, None] * IN + column[None, :],
                mask=rank_inside[:, None] & (column < IN)[None, :],
                other=0.0,
            )
            total = tl.dot(dxa, a, total, input_precision="ieee")
    _store(total, dx_ptr, None, None, row, column, M, IN, part)


@triton.jit
def add_parts_kernel(parts_ptr, y_ptr, numel, num_parts, OUTPUTS: tl.constexpr):
    """Compute y (numel,) = sum of parts (S, numel) fp32 from first to last, rounded once."""
    element = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS,), tl.float32)
    part_ptr = parts_ptr + element
    for _ in tl.range(0, num_parts):
        total += tl.load(part_ptr, mask=element < numel, other=0.0)
        part_ptr += numel
    tl.store(y_ptr + element, total.to(y_ptr.dtype.element_ty), mask=element < numel)


def linear(
    x: Tensor,
    parts: Sequence[Tensor],
    out_features: int,
    *,
    addend: Tensor | None = None,
    xa: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
    num_parts: int | None = None,
) -> Tensor:
    """Return x W^T + xa b^T + addend + bias, (M, O) in x's dtype, rounded once.

    `parts` are the quantized weight's. `num_parts` is the number of parts of the sum over I; None fills the device.
    """
    (m, i), o, arch = x.shape, out_features, compute_capability(x.device)
    config = linear_config(arch, m, x.dtype)
    return _launch(
        linear_kernel, x, parts, (addend, xa, b, bias), config, outputs=o, summed=i, in_features=i,
        rank=None if xa is None else xa.shape[1], num_parts=num_parts,
        constants={
            "WHOLE": i % config.depth == 0,
            "K_WIDTH": k_width(arch, len(parts) == 4),
            "WARPS": config.warps,
        },
    )  # fmt: skip


def dx(
    dy: Tensor,
    parts: Sequence[Tensor],
    in_features: int,
    *,
    dxa: Tensor | None = None,
    a: Tensor | None = None,
    num_parts: int | None = None,
) -> Tensor:
    """Return dy W + dxa a, (M, I) in dy's dtype, rounded once; `num_parts` splits the sum over O."""
    (m, o), i = dy.shape, in_features
    config = dx_config(compute_capability(dy.device), m, dy.dtype)
    return _launch(
        dx_kernel, dy, parts, (dxa, a), config, outputs=i, summed=o, in_features=i,
        rank=None if dxa is None else dxa.shape[1], num_parts=num_parts, constants={"WHOLE": i % config.width == 0},
    )  # fmt: skip


def _launch(
    kernel: Any,
    rows: Tensor,
    parts: Sequence[Tensor],
    operands: tuple[Tensor | None, ...],
    config: TileConfig,
    *,
    outputs: int,
    summed: int,
    in_features: int,
    rank: int | None,
    num_parts: int | None,
    constants: dict[str, Any],
) -> Tensor:
    """Launch the product of rows (M, summed) and the weight -> (M, outputs), and the sum of its parts."""
    device, m = rows.device, rows.shape[0]
    result = rows.new_empty(m, outputs)
    if result.numel() == 0:
        return result
    row_tiles, output_tiles = triton.cdiv(m, config.rows), triton.cdiv(outputs, config.width)
    depth_tiles = triton.cdiv(summed, config.depth)
    if num_parts is None:
        # As many programs as run at once, of at least 4 tiles: below that the start of a program dominates.
        num_parts = min(depth_tiles // 4, _num_sms(device) * config.programs // (row_tiles * output_tiles))
    tiles_per_part = triton.cdiv(depth_tiles, max(1, num_parts))
    num_parts = triton.cdiv(depth_tiles, tiles_per_part)
    y = result if num_parts == 1 else rows.new_empty((num_parts, m, outputs), dtype=torch.float32)
    # xa may be columns of a product that linears of one input share.
    strides = (0 if operands[1] is None else operands[1].stride(0),) if kernel is linear_kernel else ()
    codes, scales, scale, offset = parts if len(parts) == 4 else (parts[0], None, parts[1], None)
    assert codes.data_ptr() % 4 == 0, "8 codes are read at once: they must start at a multiple of 4 bytes"
    kernel[(row_tiles * output_tiles, num_parts)](
        rows, codes, scales, scale, offset,
        None if scales is None else nf4_triton.dynamic_map(device), nf4_triton.levels(device), *operands, y,
        m, outputs if kernel is linear_kernel else summed, in_features, in_features // 8, in_features // BLOCK,
        rank or 0, *strides, row_tiles, tiles_per_part,
        ROWS=config.rows, WIDTH=config.width, DEPTH=config.depth, RANKS=ranks_at_a_time(rank), **constants,
        num_warps=config.warps, num_stages=config.stages, **_OPTIONS,
    )  # fmt: skip
    if num_parts > 1:
        grid = (triton.cdiv(result.numel(), REDUCED),)
        add_parts_kernel[grid](
            y, result, result.numel(), num_parts, OUTPUTS=REDUCED, num_warps=4, enable_fp_fusion=True
        )
    return result


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
