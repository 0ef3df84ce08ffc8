"""Run NF4 in Triton with the bytes of reference.py: dequantization in one launch, and both levels of quantization.

A tile is rows of blocks: (blocks of the program, 64 weights). Only the result is allocated. docs/benchmarks.md compares
alternatives with their instruction counts.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP_BYTES, num_groups

DEQUANTIZE_BLOCKS = 128
"""Blocks per program of the dequantization: half a group, so that it needs one group_scale."""
QUANTIZE_BLOCKS = 64
"""Blocks per program of the first level."""
QUANTIZE_GROUPS = 4
"""Groups per program of the second level."""
NUM_WARPS = 4
# The contract rounds absmax twice: no fused multiply-add.
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

_MIDPOINTS = tl.constexpr(reference.nf4_midpoints())


@functools.cache
def levels(device: torch.device) -> Tensor:
    """Return the NF4 levels, (16,) fp32."""
    return torch.tensor(reference.NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the dynamic 8-bit map, (256,) fp32."""
    return reference.dynamic_map().to(device)


@functools.cache
def dynamic_midpoints(device: torch.device) -> Tensor:
    """Return (256,) fp32: what an fp32 number must exceed to be nearer to entry i + 1 than to entry i; the last is inf.

    The midpoint of two entries is exact in fp64 and mostly not in fp32. x > midpoint is x > (midpoint rounded down to
    fp32) for every fp32 x, so the comparison in fp32 is as exact as the reference's in fp64.
    """
    entries = reference.dynamic_map().double()
    exact = (entries[1:] + entries[:-1]) / 2
    rounded = exact.float()
    down = torch.where(rounded.double() > exact, torch.nextafter(rounded, torch.tensor(-math.inf)), rounded)
    return torch.cat((down, torch.tensor([math.inf]))).to(device)


@triton.jit
def has_rows(ends_ptr, first, last, size, last_expert):
    """Return whether one of the experts of `size` units that have the units from `first` to `last` has rows.

    Rows of an expert without any end where those of the expert before end.
    """
    before = tl.minimum(first // size, last_expert) - 1
    end = tl.load(ends_ptr + tl.minimum(last // size, last_expert))
    return end > tl.load(ends_ptr + before, mask=before >= 0, other=0)


@triton.jit
def _dequantize_tile(
    tile, codes_ptr, scales_ptr, group_scale_ptr, offset_ptr, map_ptr, levels_ptr, out_ptr, numel, gap,
    ROW_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    first = tile.to(tl.int64) * BLOCKS  # int64: a weight may exceed 2^31 elements.
    block = tl.arange(0, BLOCKS)
    scale = tl.load(scales_ptr + first + block)
    if group_scale_ptr is None:
        absmax = scale
    else:
        group_scale = tl.load(group_scale_ptr + tile // (256 // BLOCKS))
        absmax = tl.load(map_ptr + scale.to(tl.int32)) * group_scale + tl.load(offset_ptr)

    # 8 codes per word; the first of two is the high nibble of its byte. The parts hold whole groups: no mask.
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32)) + first * 8
    words = tl.load(words_ptr + block[:, None] * 8 + tl.arange(0, 8)[None, :])
    shift = (tl.arange(0, 8) ^ 1) * 4
    codes = (words[:, :, None] >> shift[None, None, :]) & 15
    # Flattened: a two-dimensional gather becomes shuffles in Triton 3.9. This one reads 16 words of shared memory in 16
    # banks.
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    weights = tl.reshape(tl.gather(levels, tl.reshape(codes, (BLOCKS * 64,)), 0), (BLOCKS, 64)) * absmax[:, None]

    element = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    left = tl.minimum(numel - first * 64, BLOCKS * 64).to(tl.int32)
    to = out_ptr + first * 64 + element
    if gap is not None:
        # A block lies in one row. Block numbers fit 32 bits up to 2^37 elements.
        to += ((tile * BLOCKS + block) // ROW_BLOCKS).to(tl.int64)[:, None] * gap
    tl.store(to, weights.to(out_ptr.dtype.element_ty), mask=element < left)


@triton.jit(
    do_not_specialize=["first_rank", "last_expert"], do_not_specialize_on_alignment=["group_scale_ptr", "offset_ptr"]
)
def dequantize_kernel(
    codes_ptr, scales_ptr, group_scale_ptr, offset_ptr, map_ptr, levels_ptr, out_ptr, numel,
    gap, b_ptr, num_rows, num_ranks, first_rank, tiles, ends_ptr, expert_blocks, last_expert,
    ROW_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Compute out[block, i] = round(level[code] * absmax); without group_scale_ptr `scales` holds the absmax.

    With ends_ptr the weight is that of experts of `expert_blocks` blocks, and tiles of experts without rows are left
    out.

    With a gap, rows of ROW_BLOCKS blocks are followed by `gap` elements: zeros, and b[row] from `first_rank` on. Their
    tiles, BLOCKS rows of 64 columns, come after the `tiles` of the weight.
    """
    program = tl.program_id(0)
    if ends_ptr is not None:
        if has_rows(ends_ptr, program * BLOCKS, program * BLOCKS + BLOCKS - 1, expert_blocks, last_expert):
            _dequantize_tile(
                program, codes_ptr, scales_ptr, group_scale_ptr, offset_ptr, map_ptr, levels_ptr, out_ptr, numel, gap,
                ROW_BLOCKS, BLOCKS,
            )  # fmt: skip
    elif gap is None:  # noqa: SIM114 (decided when it is compiled)
        _dequantize_tile(
            program, codes_ptr, scales_ptr, group_scale_ptr, offset_ptr, map_ptr, levels_ptr, out_ptr, numel, gap,
            ROW_BLOCKS, BLOCKS,
        )  # fmt: skip
    elif program < tiles:
        _dequantize_tile(
            program, codes_ptr, scales_ptr, group_scale_ptr, offset_ptr, map_ptr, levels_ptr, out_ptr, numel, gap,
            ROW_BLOCKS, BLOCKS,
        )  # fmt: skip
    else:
        number = program - tiles
        row = number // (gap // 64) * BLOCKS + tl.arange(0, BLOCKS)
        column = number % (gap // 64) * 64 + tl.arange(0, 64)
        rank = column - first_rank
        held = (row < num_rows)[:, None] & ((rank >= 0) & (rank < num_ranks))[None, :]
        row = row.to(tl.int64)
        b = tl.load(b_ptr + row[:, None] * num_ranks + rank[None, :], mask=held, other=0.0)
        to = out_ptr + row[:, None] * (ROW_BLOCKS * 64 + gap) + (ROW_BLOCKS * 64 + column)[None, :]
        tl.store(to, b.to(out_ptr.dtype.element_ty), mask=(row < num_rows)[:, None])


def dequantize(
    codes: Tensor,
    scales: Tensor,
    group_scale: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    *,
    b: Tensor | None = None,
    first_rank: int = 0,
    ends: Tensor | None = None,
) -> None:
    """Run reference.nf4_dequantize into `out`, bit for bit; without a group_scale `scales` holds the absmax.

    With ends (E,) int32, the end of each expert's rows, experts without rows are left out of the weight of E experts
    of whole blocks: what `out` has of them stays, except for those that share a tile of 8,192 weights with others.

    With b (O, R), out (O, I) has a row stride I + 64 n. The columns behind I become zeros, and b from `first_rank` on.
    """
    parts = (codes, scales) if group_scale is None else (codes, scales, group_scale)
    assert all(part.is_contiguous() for part in parts), [part.stride() for part in parts]
    assert codes.data_ptr() % 4 == 0, "8 codes are read at once: they must start at a multiple of 4 bytes"
    numel, device = out.numel(), codes.device
    map_ = None if group_scale is None else dynamic_map(device)
    tiles = programs = triton.cdiv(numel, DEQUANTIZE_BLOCKS * BLOCK)
    beside: tuple[int | Tensor | None, ...] = (None, None, 0, 0, 0, 0)
    row_blocks = 1
    experts: tuple[Tensor | None, int, int] = (None, 0, 0)
    if ends is not None:
        assert b is None
        assert numel % (len(ends) * BLOCK) == 0, f"{numel} weights are not {len(ends)} experts of whole blocks"
        experts = (ends, numel // (len(ends) * BLOCK), len(ends) - 1)
    if b is not None:
        (num_rows, features), gap = out.shape, out.stride(0) - out.shape[1]
        assert (b.is_contiguous(), b.shape[0]) == (True, num_rows), f"b {tuple(b.shape)}, a weight {tuple(out.shape)}"
        assert features % BLOCK == gap % BLOCK == 0, f"rows of {features} weights and {gap} columns behind them"
        assert first_rank + b.shape[1] <= gap, f"{b.shape[1]} columns from {first_rank} on, of {gap}"
        beside, row_blocks = (gap, b, num_rows, b.shape[1], first_rank, tiles), features // BLOCK
        programs += triton.cdiv(num_rows, DEQUANTIZE_BLOCKS) * (gap // BLOCK)
    dequantize_kernel[(programs,)](
        codes,
        scales,
        group_scale,
        offset,
        map_,
        levels(device),
        out,
        numel,
        *beside,
        *experts,
        ROW_BLOCKS=row_blocks,
        BLOCKS=DEQUANTIZE_BLOCKS,
        **_OPTIONS,
    )


@triton.jit
def quantize_kernel(flat_ptr, codes_ptr, absmax_ptr, numel, BLOCKS: tl.constexpr):
    """Compute codes[block, i // 2] and absmax[block] of flat[block, i]; elements from numel on count as zero."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    element = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    left = tl.minimum(numel - first * 64, BLOCKS * 64).to(tl.int32)
    weights = tl.load(flat_ptr + first * 64 + element, mask=element < left, other=0.0).to(tl.float32)
    # As integers, bits without sign are ordered like the numbers, with NaN above Inf, so it is kept.
    absmax = tl.max(weights.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    # A zero block divided by 1 stays zero, with code 7.
    divisor = tl.where(absmax > 0, absmax, 1.0)
    weights, divisor = tl.broadcast(weights, divisor[:, None])
    normalized = tl.div_rn(weights, divisor)
    index = tl.zeros((BLOCKS, 64), tl.int32)
    for i in tl.static_range(15):
        index += (normalized > _MIDPOINTS[i]).to(tl.int32)
    high, low = tl.split(tl.reshape(index, (BLOCKS, 32, 2)))
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(codes_ptr + first * 32 + byte, (high * 16 + low).to(tl.uint8))
    tl.store(absmax_ptr + first + block, absmax)


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return reference.quantize_blocks byte for byte, but for the codes of blocks with NaN or Inf."""
    flat = flat.contiguous()
    groups = num_groups(flat.numel())
    codes = torch.empty(groups, GROUP_BYTES, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(groups, BLOCKS_PER_GROUP, dtype=torch.float32, device=flat.device)
    grid = (groups * (BLOCKS_PER_GROUP // QUANTIZE_BLOCKS),)
    quantize_kernel[grid](flat, codes, absmax, flat.numel(), BLOCKS=QUANTIZE_BLOCKS, **_OPTIONS)
    return codes, absmax


@triton.jit(do_not_specialize_on_alignment=["offset_ptr", "group_scale_ptr"])
def quantize_absmax_kernel(
    absmax_ptr, offset_ptr, midpoints_ptr, scales_ptr, group_scale_ptr, num_groups, num_blocks, GROUPS: tl.constexpr
):
    """Compute scales[group, i] and group_scale[group] of absmax[group, i]; blocks from num_blocks on are padding."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    block = group[:, None] * 256 + tl.arange(0, 256)[None, :]
    held = group < num_groups
    absmax = tl.load(absmax_ptr + block, mask=block < num_blocks, other=0.0)
    centered = tl.where(block < num_blocks, absmax - tl.load(offset_ptr), 0.0)
    group_scale = tl.max(tl.abs(centered), axis=1)
    divisor = tl.where(group_scale > 0, group_scale, 1.0)
    centered, divisor = tl.broadcast(centered, divisor[:, None])
    normalized = tl.div_rn(centered, divisor)
    # Count the midpoints below by bisection.
    index = tl.zeros((GROUPS, 256), tl.int32)
    for bit in tl.static_range(7, -1, -1):
        step = 1 << bit
        index += tl.where(normalized > tl.load(midpoints_ptr + index + (step - 1)), step, 0)
    tl.store(scales_ptr + block, index.to(tl.uint8), mask=held[:, None])
    tl.store(group_scale_ptr + group, group_scale, mask=held)


def quantize_absmax(absmax: Tensor, offset: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return reference.quantize_absmax byte for byte."""
    absmax = absmax.contiguous()
    groups = absmax.shape[0]
    scales = torch.empty(groups, BLOCKS_PER_GROUP, dtype=torch.uint8, device=absmax.device)
    group_scale = torch.empty(groups, dtype=torch.float32, device=absmax.device)
    grid = (triton.cdiv(groups, QUANTIZE_GROUPS),)
    quantize_absmax_kernel[grid](
        absmax,
        offset,
        dynamic_midpoints(absmax.device),
        scales,
        group_scale,
        groups,
        num_blocks,
        GROUPS=QUANTIZE_GROUPS,
        **_OPTIONS,
    )
    return scales, group_scale
