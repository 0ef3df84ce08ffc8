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
from distlora_kernels.reference import BLOCK as BLOCK
from distlora_kernels.reference import BLOCKS_PER_GROUP as BLOCKS_PER_GROUP
from distlora_kernels.reference import GROUP as GROUP
from distlora_kernels.reference import GROUP_BYTES as GROUP_BYTES
from distlora_kernels.reference import absmax_group_sums as absmax_group_sums
from distlora_kernels.reference import num_groups as num_groups

GROUP_RECORD_BYTES = GROUP_BYTES + BLOCKS_PER_GROUP + 4
"""Stored bytes per group: codes, scales and group_scale."""
PLAIN_RECORD_BYTES = GROUP_BYTES + 4 * BLOCKS_PER_GROUP
"""Stored bytes per group without double quantization: codes and absmax."""

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


def nf4_dequantize(
    codes: Tensor,
    scales: Tensor,
    group_scale: Tensor,
    offset: Tensor,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weight in `dtype` (fp32, bf16, fp16): fl(level * absmax) in fp32, rounded to nearest even once.

    The result equals bitsandbytes' bit for bit from the same stored bytes.

    Args:
        codes: (G, 8192) uint8.
        scales: (G, 256) uint8.
        group_scale: (G,) fp32.
        offset: () fp32.
        shape: Shape of the weight.
        dtype: Dtype of the result.
        out: Contiguous memory of that dtype and number of elements; the result is then a view of it.
    """
    _check_parts((codes, scales, group_scale), shape)
    if not uses_triton(codes):
        weight = nf4_cpu.dequantize(codes, scales, group_scale, offset, shape=shape, dtype=dtype)
        return weight if out is None else _place(out, shape, dtype, codes.device).copy_(weight)
    from distlora_kernels import nf4_triton

    weight = _place(out, shape, dtype, codes.device)
    with on_device_of(codes):
        nf4_triton.dequantize(codes, scales, group_scale, offset, weight)
    return weight


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return nf4_dequantize of a weight without double quantization, whose absmax (G, 256) fp32 is stored.

    The result equals bitsandbytes' bit for bit from the same stored bytes.
    """
    _check_parts((codes, absmax), shape)
    if not uses_triton(codes):
        weight = nf4_cpu.dequantize_blocks(codes, absmax, shape=shape, dtype=dtype)
        return weight if out is None else _place(out, shape, dtype, codes.device).copy_(weight)
    from distlora_kernels import nf4_triton

    weight = _place(out, shape, dtype, codes.device)
    with on_device_of(codes):
        nf4_triton.dequantize(codes, absmax, None, None, weight)
    return weight


def dequantize_beside(
    parts: Sequence[Tensor], shape: tuple[int, ...], b: Tensor, *, first_rank: int, out: Tensor
) -> None:
    """Dequantize a weight of `shape` (O, I) beside b (O, R) into `out` (O, I + 64 n), on a GPU.

    The columns behind the weight are zeros, and b from column I + `first_rank` on. I is a multiple of 64; `parts` are a
    FrozenWeight's.
    """
    from distlora_kernels import nf4_triton

    codes, scales, *rest = parts
    group_scale, offset = rest or (None, None)
    _check_parts(tuple(parts[:3]), shape)
    assert (out.shape[0], out.dtype, out.is_contiguous()) == (shape[0], b.dtype, True), (
        f"{tuple(out.shape)} {out.dtype}"
    )
    with on_device_of(codes):
        nf4_triton.dequantize(codes, scales, group_scale, offset, out[:, : shape[1]], b=b, first_rank=first_rank)


def dequantize_slice(
    codes: Tensor,
    scales: Tensor,
    group_scale: Tensor,
    offset: Tensor,
    *,
    start: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights from index `start` on that fill `shape`, bit for bit those of the whole; on the CPU.

    Both ends must be block boundaries: an expert's slice of a fused weight.
    """
    first, blocks = start // BLOCK, math.prod(shape) // BLOCK
    assert start % BLOCK == math.prod(shape) % BLOCK == 0, f"{shape} from {start} on is not of whole blocks"
    assert first + blocks <= scales.numel(), f"{shape} from {start} on is beyond {scales.numel()} blocks"
    block_scale = group_scale[torch.arange(first, first + blocks) // BLOCKS_PER_GROUP]
    absmax = nf4_cpu.dynamic_map()[scales.view(-1)[first : first + blocks].int()].mul_(block_scale).add_(offset)
    half = BLOCK // 2
    slice_codes = codes.view(-1)[first * half : (first + blocks) * half]
    return nf4_cpu.dequantize_blocks(slice_codes, absmax, shape=shape, dtype=dtype)


def _check_parts(parts: tuple[Tensor, ...], shape: tuple[int, ...]) -> None:
    groups = num_groups(math.prod(shape))
    shapes = [(groups, GROUP_BYTES), (groups, BLOCKS_PER_GROUP), (groups,)]
    found = [tuple(part.shape) for part in parts]
    assert found == shapes[: len(parts)], f"a weight {shape} has {groups} groups; the parts are {found}"


def _place(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tensor to write a weight to: a new one, or `out`, checked, in the weight's shape."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    assert (out.numel(), out.dtype, out.device) == (math.prod(shape), dtype, device), f"{shape} {dtype} on {device}"
    assert out.is_contiguous(), out.stride()
    return out.view(shape)


def bits_per_weight(numel: int) -> float:
    """Return the stored bits per weight, with padding and offset: 4.127 for a large one (4 + 8/64 + 32/16384)."""
    groups = num_groups(numel)
    return 8 * (groups * GROUP_RECORD_BYTES + 4) / numel
