"""Uniform int4, the data type that NF4 is measured against, stored as NF4 is.

QLoRA's "Int4" (arXiv 2305.14314, table 2) is bitsandbytes' linear map of 4 bits: 15 levels k/7, k = -7..7, of a block's
absmax. Blocks of 64, two codes a byte and the double quantization of the absmax are those of distlora_kernels, so a
weight takes the same bytes either way and only the places of the levels differ. The 16th code is not used: a sixteenth
level would cost the zero or the symmetry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP, GROUP_BYTES, dequantize_absmax, num_groups

LEVELS = tuple(k / 7 for k in range(-7, 8))
ZERO_CODE = LEVELS.index(0.0)


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """flat (n,) of any float dtype -> codes (G, 8192) uint8 and absmax (G, 256) fp32, as `nf4.quantize_blocks`.

    code = nearest level of w / absmax, ties to the lower index; the first of two weights is the high nibble. Padding
    and all-zero blocks get absmax 0 and codes 7.
    """
    groups = num_groups(flat.numel())
    padded = torch.zeros(groups * GROUP, dtype=torch.float32, device=flat.device)
    padded[: flat.numel()] = flat
    blocks = padded.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    normalized = torch.where(absmax > 0, blocks / absmax, 0.0)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=flat.device)
    index = torch.bucketize(normalized, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return ((index[:, 0] << 4) | index[:, 1]).view(groups, GROUP_BYTES), absmax.view(groups, BLOCKS_PER_GROUP)


def dequantize(
    codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """w = round_to_nearest_even(fl(level[code] * absmax)) in `dtype`, shaped `shape`, as `nf4.nf4_dequantize`."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)
    nibbles = torch.stack((codes >> 4, codes & 15), dim=-1).view(-1, BLOCK)
    weights = levels[nibbles.long()] * dequantize_absmax(scales, group_scale, offset).view(-1, 1)
    return weights.view(-1)[: torch.Size(shape).numel()].view(shape).to(dtype)
