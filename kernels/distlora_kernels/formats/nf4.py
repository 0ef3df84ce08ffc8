"""Quantize and dequantize NF4 with double quantization: check the operands and choose the CPU path or Triton.

Byte layout of a quantized weight, for G groups of 256 blocks of 64 weights:
    codes (G, 8192) uint8: two 4-bit NF4 codes per byte, the first weight in the high nibble
    scales (G, 256) uint8: index of each block's absmax in the dynamic 8-bit map
    group_scale (G,) fp32: largest abs(absmax - offset) of the group
    offset () fp32: mean of all absmax of the tensor
A weight without double quantization has two parts: codes, and absmax (G, 256) fp32. All but the offset share dim 0, so
a shard boundary in dim 0 is a group boundary in each part. README.md says how this relates to bitsandbytes' format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distlora_kernels import nf4_cpu, reference
from distlora_kernels.dispatch import on_device_of, uses_triton
from distlora_kernels.formats.base import Format, place
from distlora_kernels.reference import BLOCK as BLOCK
from distlora_kernels.reference import BLOCKS_PER_GROUP as BLOCKS_PER_GROUP
from distlora_kernels.reference import GROUP as GROUP
from distlora_kernels.reference import GROUP_BYTES as GROUP_BYTES
from distlora_kernels.reference import absmax_group_sums as absmax_group_sums
from distlora_kernels.reference import num_groups as num_groups

_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize flat (n,) fp32, bf16 or fp16 to codes (G, 8192) uint8 and absmax (G, 256) fp32: the first level.

    The bytes equal bitsandbytes'. If n is not a multiple of 16,384 the last group is padded with zeros, whose code is
    7.
    """
    assert flat.dtype in _SOURCE_DTYPES, f"NF4 quantizes fp32, bf16 and fp16, not {flat.dtype}"
    assert flat.dim() == 1, f"NF4 quantizes the flattened weight, got shape {tuple(flat.shape)}"
    if not uses_triton(flat):
        return nf4_cpu.quantize_blocks(flat)
    from distlora_kernels import nf4_triton

    with on_device_of(flat):
        return nf4_triton.quantize_blocks(flat)


def quantize_absmax(absmax: Tensor, offset: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Quantize absmax (G, 256) fp32 to scales (G, 256) uint8 and group_scale (G,) fp32: the second level.

    scale = exactly nearest entry of the dynamic map, ties to the lower index. The offset is the whole tensor's, ()
    fp32. Blocks from `num_blocks` on are padding. absmax must be finite.
    """
    assert absmax.dtype == offset.dtype == torch.float32, f"absmax {absmax.dtype}, offset {offset.dtype}"
    assert absmax.shape[1:] == (BLOCKS_PER_GROUP,), f"absmax {tuple(absmax.shape)}"
    if not uses_triton(absmax):
        return reference.quantize_absmax(absmax, offset, num_blocks)
    from distlora_kernels import nf4_triton

    with on_device_of(absmax):
        return nf4_triton.quantize_absmax(absmax, offset, num_blocks)


def absmax_offset(group_sums: Tensor, num_blocks: int) -> float:
    """Return the offset, the mean of all absmax of a tensor, from its groups' fp64 sums (G,).

    math.fsum rounds the exact sum once, so the result depends neither on order nor on the number of ranks.
    """
    return math.fsum(group_sums.tolist()) / num_blocks


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize a whole weight to (codes, scales, group_scale, offset). Raises ValueError for NaN or Inf."""
    codes, absmax = quantize_blocks(weight.reshape(-1))
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or Inf, which NF4 cannot represent")
    num_blocks = -(-weight.numel() // BLOCK)
    offset = torch.tensor(
        absmax_offset(absmax_group_sums(absmax), num_blocks), dtype=torch.float32, device=weight.device
    )
    scales, group_scale = quantize_absmax(absmax, offset, num_blocks)
    return codes, scales, group_scale, offset


class Nf4(Format):
    """NF4 with double quantization, or with the fp32 absmax of each block."""

    def dequantize(
        self, parts: Sequence[Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return the weight in `dtype` (fp32, bf16, fp16): fl(level * absmax) in fp32, rounded to nearest even once.

        The result equals bitsandbytes' bit for bit from the same stored bytes.
        """
        self.check(parts, shape)
        if not uses_triton(parts[0]):
            decode = nf4_cpu.dequantize if self.replicated else nf4_cpu.dequantize_blocks
            weight = decode(*parts, shape=shape, dtype=dtype)
            return weight if out is None else place(out, shape, dtype, weight.device).copy_(weight)
        weight = place(out, shape, dtype, parts[0].device)
        with on_device_of(parts[0]):
            self.run_triton(parts, weight)
        return weight

    def run_triton(self, parts: Sequence[Tensor], out: Tensor, ends: Tensor | None = None) -> None:
        """Write the weight to `out`, which has its shape, in nf4_triton.py."""
        from distlora_kernels import nf4_triton

        codes, scales, *rest = parts
        group_scale, offset = rest or (None, None)
        nf4_triton.dequantize(codes, scales, group_scale, offset, out, ends=ends)


NF4, NF4_ABSMAX = Nf4.named("nf4"), Nf4.named("nf4_absmax")


def dequantize_beside(
    format: Nf4, parts: Sequence[Tensor], shape: tuple[int, ...], b: Tensor, *, first_rank: int, out: Tensor
) -> None:
    """Dequantize a weight of `shape` (O, I) beside b (O, R) into `out` (O, I + 64 n), on a GPU.

    The columns behind the weight are zeros, and b from column I + `first_rank` on. I is a multiple of 64.
    """
    from distlora_kernels import nf4_triton

    format.check(parts, shape)
    codes, scales, *rest = parts
    group_scale, offset = rest or (None, None)
    assert (out.shape[0], out.dtype, out.is_contiguous()) == (shape[0], b.dtype, True), (
        f"{tuple(out.shape)} {out.dtype}"
    )
    with on_device_of(codes):
        nf4_triton.dequantize(codes, scales, group_scale, offset, out[:, : shape[1]], b=b, first_rank=first_rank)
