"""Define every op of this package in plain torch. The code is simple, not fast.

Letters: G double-quantization groups (256 blocks of 64 weights: 16,384), M rows of the input, O out features, R
adapter rank. Formats and formulas are bitsandbytes' (the folder's README.md has the byte layout).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.buffers import STRIPE_ELEMENTS
from distlora_kernels.format_layouts import GROUP as GROUP

BLOCK = 64
"""Number of consecutive weights of the flattened tensor that share one absmax."""
BLOCKS_PER_GROUP = GROUP // BLOCK
"""Number of absmax values that share one group_scale."""
GROUP_BYTES = GROUP // 2

# The NF4 levels (QLoRA, arXiv 2305.14314, appendix E) as the fp32 values that bitsandbytes stores.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
ZERO_CODE = NF4_LEVELS.index(0.0)


def midpoints(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Return the midpoints of neighbouring levels, rounded to fp32; a weight on one goes to the lower level."""
    values = torch.tensor(levels, dtype=torch.float32)
    return tuple(((values[1:] + values[:-1]) / 2).tolist())


def nf4_midpoints() -> tuple[float, ...]:
    """Return the 15 decision levels of NF4."""
    return midpoints(NF4_LEVELS)


def dynamic_map() -> Tensor:
    """Return bitsandbytes' signed dynamic 8-bit map: (256,) fp32, sorted, from -0.993 to 1, with 0 at index 127.

    It has seven decades; decade i has 2^i midpoints of linspace(0.1, 1, 2^i + 1) times 10^(i-6), with both signs, plus
    0 and 1 (Dettmers et al., arXiv 2110.02861, section 2.1).
    """
    values = [0.0, 1.0]
    start = torch.tensor(0.1, dtype=torch.float32)
    for decade in range(7):
        # torch.linspace differs in the last bits with and without vector instructions (42 of 256 entries, up to 2
        # ulps). These are the bits with: from both ends, each edge computed in fp64 and rounded once.
        step = ((1.0 - start) / 2**decade).double()
        index = torch.arange(2**decade + 1, dtype=torch.float64)
        edges = torch.where(index <= 2**decade // 2, start + step * index, 1.0 - step * (2**decade - index)).float()
        means = (10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


ZERO_SCALE = 127
"""Index of 0 in the dynamic map."""


def num_groups(numel: int) -> int:
    """Return the number of groups of `numel` weights; the last one may be padded."""
    return -(-numel // GROUP)


def quantize_blocks(flat: Tensor, levels: tuple[float, ...] = NF4_LEVELS) -> tuple[Tensor, Tensor]:
    """Quantize flat (n,), of any float dtype, to codes (G, 8192) uint8 and absmax (G, 256) fp32: the first level.

    code = nearest level of w / absmax, ties to the lower index; the first of two weights is the high nibble. Padding
    and all-zero blocks get absmax 0 and the code of 0 (7). The absmax of a block with NaN or Inf is not finite, and its
    codes are undefined.
    """
    groups = num_groups(flat.numel())
    padded = torch.zeros(groups * GROUP, dtype=torch.float32, device=flat.device)
    padded[: flat.numel()] = flat
    blocks = padded.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    normalized = torch.where(absmax > 0, blocks / absmax, 0.0)
    borders = torch.tensor(midpoints(levels), dtype=torch.float32, device=flat.device)
    index = torch.bucketize(normalized, borders).to(torch.uint8).view(-1, 2)
    return ((index[:, 0] << 4) | index[:, 1]).view(groups, GROUP_BYTES), absmax.view(groups, BLOCKS_PER_GROUP)


def absmax_group_sums(absmax: Tensor) -> Tensor:
    """Return the sum of each group, (G, 256) fp32 -> (G,) fp64, by a fixed tree of halves."""
    total = absmax.double()
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total.squeeze(1)


def quantize_absmax(absmax: Tensor, offset: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Quantize absmax (G, 256) fp32 to scales (G, 256) uint8 and group_scale (G,) fp32: the second level.

    scale = exactly nearest entry of the dynamic map to (absmax - offset) / group_scale, ties to the lower index;
    group_scale = the group's largest |absmax - offset|. Blocks from `num_blocks` on are padding and are ignored.
    """
    centered = absmax - offset
    centered.view(-1)[num_blocks:] = 0.0
    group_scale = centered.abs().amax(dim=1)
    normalized = torch.where(group_scale[:, None] > 0, centered / group_scale[:, None], 0.0)
    # Midpoints of two fp32 values are exact in fp64, so the choice is exactly the nearest entry.
    entries = dynamic_map().to(absmax.device).double()
    scales = torch.bucketize(normalized.double(), (entries[1:] + entries[:-1]) / 2).to(torch.uint8)
    return scales, group_scale


def dequantize_absmax(scales: Tensor, group_scale: Tensor, offset: Tensor) -> Tensor:
    """Return absmax (G, 256) fp32 = fl(fl(map[scale] * group_scale) + offset): two roundings, no fused multiply-add."""
    entries = dynamic_map().to(scales.device)
    return entries[scales.long()] * group_scale[:, None] + offset


def nf4_dequantize(
    codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return w = round_to_nearest_even(fl(level[code] * absmax)) in `dtype` and `shape`, without padding."""
    return dequantize_blocks(codes, dequantize_absmax(scales, group_scale, offset), shape=shape, dtype=dtype)


def dequantize_blocks(
    codes: Tensor,
    absmax: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    levels: tuple[float, ...] = NF4_LEVELS,
) -> Tensor:
    """Return nf4_dequantize's result from the absmax (G, 256) fp32: for weights without double quantization."""
    values = torch.tensor(levels, dtype=torch.float32, device=codes.device)
    nibbles = torch.stack((codes >> 4, codes & 15), dim=-1).view(-1, BLOCK)
    weights = values[nibbles.long()] * absmax.view(-1, 1)
    return weights.view(-1)[: torch.Size(shape).numel()].view(shape).to(dtype)


def dora_norms(row_norms_squared: Tensor, wa: Tensor, gram: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return sqrt(||W_o||^2 + 2 s <wa, b> + s^2 <b gram, b>) of each row, (O,) fp32, with gram = A A^T (R, R)."""
    wa, b = wa.float(), b.float()
    cross, square = (wa * b).sum(dim=1), ((b @ gram) * b).sum(dim=1)
    return root((row_norms_squared + 2 * scale * cross + scale**2 * square).clamp_min(0))


def root(squares: Tensor) -> Tensor:
    """Return the correctly rounded fp32 square root: torch's on the CPU is off by one bit for 15 % of the numbers."""
    return squares.double().sqrt().float()


def magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor) -> Tensor:
    """Return the sum over M of dy * y (M, O) divided by the magnitude, (O,) fp32; 0 where the magnitude is 0."""
    rows = max(1, STRIPE_ELEMENTS // max(dy.shape[1], 1))
    total = torch.zeros_like(magnitude)
    for left, right in zip(dy.split(rows), y.split(rows), strict=True):
        total += (left.float() * right.float()).sum(dim=0)
    return torch.where(magnitude == 0, 0.0, total / magnitude)
