"""Contract of NF4 with double quantization: what goes in and out, checked; picks the CPU path or the reference.

A quantized weight is four tensors (README.md has the byte layout):
    codes (G, 8192) uint8, scales (G, 256) uint8, group_scale (G,) fp32, offset () fp32
A weight that comes without double quantization is two: codes, and absmax (G, 256) fp32. All but the offset share dim 0
= G groups of 16,384 weights, so a cut there is a cut at a group boundary in each of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distlora_kernels import nf4_cpu, reference
from distlora_kernels.reference import (
    BLOCK,
    BLOCKS_PER_GROUP,
    GROUP,
    GROUP_BYTES,
    absmax_group_sums,
    num_groups,
    quantize_absmax,
)

__all__ = [
    "BLOCK",
    "BLOCKS_PER_GROUP",
    "GROUP",
    "GROUP_BYTES",
    "GROUP_RECORD_BYTES",
    "PLAIN_RECORD_BYTES",
    "absmax_group_sums",
    "absmax_offset",
    "bits_per_weight",
    "dequantize_blocks",
    "nf4_dequantize",
    "nf4_quantize",
    "num_groups",
    "quantize_absmax",
    "quantize_blocks",
]

GROUP_RECORD_BYTES = GROUP_BYTES + BLOCKS_PER_GROUP + 4
"""Stored bytes of a group: its codes, scales and group_scale."""
PLAIN_RECORD_BYTES = GROUP_BYTES + 4 * BLOCKS_PER_GROUP
"""Stored bytes of a group without double quantization: its codes and absmax."""

_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """First level of a run of whole groups: flat (n,) fp32, bf16 or fp16 -> codes (G, 8192) uint8, absmax (G, 256)
    fp32.

    Equal to bitsandbytes byte for byte. n need not be a multiple of 16,384: the last group is padded with codes of 0.
    """
    torch._check_type(flat.dtype in _SOURCE_DTYPES, lambda: f"NF4 quantizes fp32, bf16 and fp16, not {flat.dtype}")
    torch._check(flat.dim() == 1, lambda: f"NF4 quantizes the flattened weight, got shape {tuple(flat.shape)}")
    return nf4_cpu.quantize_blocks(flat) if flat.device.type == "cpu" else reference.quantize_blocks(flat)


def absmax_offset(group_sums: Tensor, num_blocks: int) -> float:
    """The offset: mean of all absmax of a tensor, from its groups' fp64 sums (G,).

    math.fsum rounds the exact sum once, so the result does not depend on order, nor on who summed which group.
    """
    return math.fsum(group_sums.tolist()) / num_blocks


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A whole weight -> (codes, scales, group_scale, offset). Raises ValueError for NaN or Inf weights."""
    codes, absmax = quantize_blocks(weight.reshape(-1))
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or Inf, which NF4 cannot represent")
    num_blocks = -(-weight.numel() // BLOCK)
    offset = torch.tensor(
        absmax_offset(absmax_group_sums(absmax), num_blocks), dtype=torch.float32, device=weight.device
    )
    scales, group_scale = quantize_absmax(absmax, offset, num_blocks)
    return codes, scales, group_scale, offset


def nf4_dequantize(
    codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The weight (shape) in `dtype` (fp32, bf16, fp16): fl(level * absmax) in fp32, rounded to nearest even once.

    Equal to bitsandbytes bit for bit from the same stored bytes. Raises RuntimeError for parts that do not fit `shape`.
    """
    groups = num_groups(math.prod(shape))
    fits = (
        codes.shape == (groups, GROUP_BYTES)
        and scales.shape == (groups, BLOCKS_PER_GROUP)
        and group_scale.shape == (groups,)
    )
    torch._check(
        fits,
        lambda: (
            f"a weight {shape} has {groups} groups; got codes {tuple(codes.shape)}, scales {tuple(scales.shape)}, "
            f"group_scale {tuple(group_scale.shape)}"
        ),
    )
    dequantize = nf4_cpu.dequantize if codes.device.type == "cpu" else reference.nf4_dequantize
    return dequantize(codes, scales, group_scale, offset, shape=shape, dtype=dtype)


def dequantize_blocks(codes: Tensor, absmax: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """nf4_dequantize of a weight without double quantization: absmax (G, 256) fp32, one a block, is stored itself.

    Equal to bitsandbytes bit for bit from the same stored bytes. Raises RuntimeError for parts that do not fit `shape`.
    """
    groups = num_groups(math.prod(shape))
    torch._check(
        codes.shape == (groups, GROUP_BYTES) and absmax.shape == (groups, BLOCKS_PER_GROUP),
        lambda: f"a weight {shape} has {groups} groups; got codes {tuple(codes.shape)}, absmax {tuple(absmax.shape)}",
    )
    dequantize = nf4_cpu.dequantize_blocks if codes.device.type == "cpu" else reference.dequantize_blocks
    return dequantize(codes, absmax, shape=shape, dtype=dtype)


def bits_per_weight(numel: int) -> float:
    """Stored bits a weight, padding and offset included: 4.127 for a large one (4 + 8/64 + 32/16384)."""
    groups = num_groups(numel)
    return 8 * (groups * GROUP_RECORD_BYTES + 4) / numel
