"""Dequantize the formats of formats/ in Triton, one launch per weight: the values of their CPU path bit for bit.

A program writes 8,192 weights, half a group. Only the result is allocated. A number in low bits is put where fp32 has
its exponent and mantissa, and multiplied by the power of two between the two biases; numbers below fp32's normal ones
must not be flushed to 0, and Triton does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from distlora_kernels.formats.base import UNIT, Format
from distlora_kernels.formats.gguf import Gguf
from distlora_kernels.nf4_triton import has_rows
from distlora_kernels.reference import GROUP

WEIGHTS = GROUP // 2
"""Weights per program."""
NUM_WARPS = 4
# A product and a sum are rounded one by one: no fused multiply-add.
_OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

_UNIT = tl.constexpr(UNIT)
# An arithmetic shift leaves copies of the sign between the sign and the 7 or 3 other bits; they are masked.
_SIGN_AND_7, _SIGN_AND_3 = tl.constexpr(0x87F00000 - 2**32), tl.constexpr(0x81C00000 - 2**32)


@triton.jit
def _e4m3(byte):
    """Return float8_e4m3fn in fp32. sm_80 has no conversion."""
    bits = (byte.to(tl.int8, bitcast=True).to(tl.int32) << 20) & _SIGN_AND_7
    value = bits.to(tl.float32, bitcast=True) * 2.0**120
    return tl.where(tl.abs(value) == 480, float("nan"), value)


@triton.jit(do_not_specialize=["last_expert"])
def blocks_kernel(
    codes_ptr, scales_ptr, third_ptr, out_ptr, numel, columns, ends_ptr, expert_units, last_expert,
    KIND: tl.constexpr, BLOCK: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Write WEIGHTS weights in blocks of BLOCK. third_ptr: NVFP4's global scales or int4's zero points, or None.

    The parts hold whole groups: no mask. fp8_block's are the rows of a tile; only it has `columns`.

    With ends_ptr the weight is that of experts of `expert_units` units, or rows of a tiled matrix, and a program
    without experts that have rows ends at once.
    """
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = WEIGHTS // BLOCK
    if ends_ptr is not None:
        if columns is None:
            unit, count = program * (WEIGHTS // _UNIT), WEIGHTS // _UNIT
        else:
            HALVES: tl.constexpr = 16384 // WEIGHTS
            unit, count = program // HALVES // tl.cdiv(columns, 128) * 128 + program % HALVES * BLOCKS, BLOCKS
        if not has_rows(ends_ptr, unit, unit + count - 1, expert_units, last_expert):
            return
    first = program.to(tl.int64) * WEIGHTS  # int64: a weight may exceed 2^31 elements.
    block = tl.arange(0, BLOCKS)
    at_scales = program.to(tl.int64) * BLOCKS + block
    if KIND == "int8" or KIND == "fp8_block":
        codes = tl.load(codes_ptr + first + tl.arange(0, WEIGHTS))
    else:
        # 8 codes per word, the first in the lowest bits.
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32)) + first // 8
        words = tl.load(words_ptr + tl.arange(0, WEIGHTS // 8))
        codes = words[:, None] << (28 - tl.arange(0, 8) * 4)[None, :]  # In the highest bits.
    codes = tl.reshape(codes, (BLOCKS, BLOCK))

    if KIND == "mxfp4":
        exponent = tl.load(scales_ptr + at_scales).to(tl.int32)
        # Half of the power, 2^(exponent - 128), as 2^128 is beyond fp32. The first two are below its normal numbers.
        bits = tl.where(exponent < 2, 0x200000 << exponent, (exponent - 1) << 23)
        scale = bits.to(tl.float32, bitcast=True)
    elif KIND == "nvfp4":
        divisor = tl.load(third_ptr + program // (16384 // WEIGHTS))
        scale = _e4m3(tl.load(scales_ptr + at_scales))
        scale, divisor = tl.broadcast(scale, divisor)
        scale = tl.div_rn(scale, divisor)
    elif KIND == "fp8_block":
        scale = tl.load(scales_ptr + program // (16384 // WEIGHTS) + tl.zeros((BLOCKS,), tl.int32))
    else:
        scale = tl.load(scales_ptr + at_scales).to(tl.float32)

    if KIND == "int8":
        values = codes.to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == "fp8_block":
        values = _e4m3(codes)
    elif KIND == "int4":
        zero = 8 if third_ptr is None else tl.load(third_ptr + at_scales).to(tl.int32)[:, None]
        values = (((codes >> 28) & 15) - zero).to(tl.float32)
    else:
        tl.static_assert(KIND == "mxfp4" or KIND == "nvfp4", "a kind of codes that this kernel does not decode")
        values = ((codes >> 6) & _SIGN_AND_3).to(tl.float32, bitcast=True) * (2.0**127 if KIND == "mxfp4" else 2.0**126)
    values = (values * scale[:, None]).to(out_ptr.dtype.element_ty)

    if columns is None:
        element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        left = tl.minimum(numel - first, WEIGHTS).to(tl.int32)
        tl.store(out_ptr + first + element, values, mask=element < left)
    else:
        tile, across = program // (16384 // WEIGHTS), tl.cdiv(columns, 128)
        row = (tile // across) * 128 + (program % (16384 // WEIGHTS)) * BLOCKS + block
        column = (tile % across) * 128 + tl.arange(0, 128)
        # `numel` is the number of rows.
        held = (row < numel)[:, None] & (column < columns)[None, :]
        tl.store(out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], values, mask=held)


@triton.jit
def _half(ptr):
    return tl.load(ptr.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _byte(ptr):
    return tl.load(ptr).to(tl.int32)


@triton.jit
def _field(ptr, number, FIELD: tl.constexpr):
    """Return the numbers of a field of gguf.py: (first byte, bits, run)."""
    SPAN: tl.constexpr = FIELD[2] * (8 // FIELD[1])
    byte = _byte(ptr + FIELD[0] + number // SPAN * FIELD[2] + number % FIELD[2])
    return (byte >> (number % SPAN // FIELD[2] * FIELD[1])) & ((1 << FIELD[1]) - 1)


@triton.jit(do_not_specialize=["last_expert"])
def gguf_kernel(
    blocks_ptr, out_ptr, numel, ends_ptr, expert_units, last_expert,
    TYPE: tl.constexpr, BYTES: tl.constexpr, BLOCKS: tl.constexpr, SUBS: tl.constexpr, SIZE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Write BLOCKS blocks of BYTES bytes, of SUBS sub-blocks of SIZE weights: code * factor (+ added).

    Blocks begin at odd multiples of 2 bytes, so bytes are read one by one; a thread's neighbours find them in the L1
    cache. The parts hold whole groups: no mask. ends_ptr: as in `blocks_kernel`.
    """
    if ends_ptr is not None:
        UNITS: tl.constexpr = BLOCKS * SUBS * SIZE // _UNIT
        unit = tl.program_id(0) * UNITS
        if not has_rows(ends_ptr, unit, unit + UNITS - 1, expert_units, last_expert):
            return
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = blocks_ptr + (first + tl.arange(0, BLOCKS))[:, None] * BYTES
    sub = tl.arange(0, SUBS)[None, :]
    weight = sub[:, :, None] * SIZE + tl.arange(0, SIZE)[None, None, :]
    codes = _field(block[:, :, None], weight, LOW)
    if HIGH is not None:
        codes |= _field(block[:, :, None], weight, HIGH) << LOW[1]
    if LOW[1] == 8:
        codes = (codes ^ 128) - 128  # A sign.
    codes -= OFFSET

    added = None
    if SUBS == 1:
        factor = _half(block)
        if TYPE == "q4_1" or TYPE == "q5_1":
            added = _half(block + 2)
    elif TYPE == "q2_K":
        scales = _byte(block + sub)
        factor, added = (
            _half(block + 80) * (scales & 15).to(tl.float32),
            -(_half(block + 82) * (scales >> 4).to(tl.float32)),
        )
    elif TYPE == "q3_K":
        scale = _field(block, sub, (96, 4, 8)) | (_field(block, sub, (104, 2, 4)) << 4)
        factor = _half(block + 108) * (scale - 32).to(tl.float32)
    elif TYPE == "q6_K":
        factor = _half(block + 208) * tl.load(block + 192 + sub).to(tl.int8, bitcast=True).to(tl.float32)
    else:  # q4_K, q5_K
        low, middle, high = _byte(block + 4 + sub % 4), _byte(block + 8 + sub % 4), _byte(block + 12 + sub % 4)
        scale = tl.where(sub < 4, low & 63, (high & 15) | ((low >> 2) & 48))
        least = tl.where(sub < 4, middle & 63, (high >> 4) | ((middle >> 2) & 48))
        factor, added = _half(block) * scale.to(tl.float32), -(_half(block + 2) * least.to(tl.float32))

    values = codes.to(tl.float32) * factor[:, :, None]
    if added is not None:
        values += added[:, :, None]
    BLOCK: tl.constexpr = SUBS * SIZE
    element = tl.arange(0, BLOCKS)[:, None, None] * BLOCK + weight
    left = tl.minimum(numel - first * BLOCK, BLOCKS * BLOCK).to(tl.int32)
    tl.store(out_ptr + first * BLOCK + element, values.to(out_ptr.dtype.element_ty), mask=element < left)


def dequantize(format: Format, parts: Sequence[Tensor], out: Tensor, ends: Tensor | None = None) -> None:
    """Run `format.dequantize` into `out`, which has the weight's shape.

    With ends (E,) int32, the end of each expert's rows, programs of experts (O, I) without rows write nothing.
    """
    assert all(part.is_contiguous() for part in parts), [part.stride() for part in parts]
    kernel, constants = kernel_of(format)
    programs = triton.cdiv(out.numel(), WEIGHTS)
    experts: tuple[Tensor | None, int, int] = (None, 0, 0)
    if ends is not None:
        per_expert = out.shape[1] if format.tile is not None else math.prod(out.shape[1:]) // UNIT
        experts = (ends, per_expert, len(ends) - 1)
    if isinstance(format, Gguf):
        assert parts[0].data_ptr() % 2 == 0, "fp16 numbers are read: blocks must start at a multiple of 2 bytes"
        kernel[(programs,)](parts[0], out, out.numel(), *experts, **constants, **_OPTIONS)
        return
    assert parts[0].data_ptr() % 4 == 0, "8 codes are read at once: they must start at a multiple of 4 bytes"
    size, columns = out.numel(), None
    if format.tile is not None:
        columns, programs = out.shape[-1], len(parts[0]) * (GROUP // WEIGHTS)
        size //= columns
    codes, scales, third = (*parts, None)[:3]
    kernel[(programs,)](codes, scales, third, out, size, columns, *experts, **constants, **_OPTIONS)


def kernel_of(format: Format) -> tuple[Any, dict[str, Any]]:
    """Return a format's kernel and its constants."""
    if isinstance(format, Gguf):
        subs, low, high, offset = format.codes
        sizes = {"BLOCKS": WEIGHTS // format.block, "SUBS": subs, "SIZE": format.block // subs}
        fields = {"LOW": low, "HIGH": high, "OFFSET": offset}
        return gguf_kernel, {"TYPE": format.name, "BYTES": format.nbytes, **sizes, **fields}
    block = format.block if format.tile is None else format.tile[1]
    return blocks_kernel, {"KIND": format.name.partition("_g")[0], "BLOCK": block, "WEIGHTS": WEIGHTS}
