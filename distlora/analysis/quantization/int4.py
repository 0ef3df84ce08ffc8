"""Uniform int4, the data type that NF4 is measured against, stored as NF4 is.

QLoRA's "Int4" (arXiv 2305.14314, table 2) is bitsandbytes' linear map of 4 bits: 15 levels k/7, k = -7..7, of a block's
absmax. Blocks of 64, two codes a byte and the double quantization of the absmax are those of distlora_kernels, so a
weight takes the same bytes either way and only the places of the levels differ. The 16th code is not used: a sixteenth
level would cost the zero or the symmetry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels import reference

LEVELS = tuple(k / 7 for k in range(-7, 8))
ZERO_CODE = LEVELS.index(0.0)


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """flat (n,) of any float dtype -> codes (G, 8192) uint8 and absmax (G, 256) fp32, as `nf4.quantize_blocks`."""
    return reference.quantize_blocks(flat, LEVELS)


def dequantize(
    codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """w = round_to_nearest_even(fl(level[code] * absmax)) in `dtype`, shaped `shape`, as `nf4.nf4_dequantize`."""
    absmax = reference.dequantize_absmax(scales, group_scale, offset)
    return reference.dequantize_blocks(codes, absmax, shape=shape, dtype=dtype, levels=LEVELS)
