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

import torch
from torch import Tensor

from distlora_kernels import nf4_cpu, reference
from distlora_kernels.dispatch import check, on_device_of, register, uses_triton
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP, GROUP_BYTES, absmax_group_sums, num_groups

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
    "dequantize_slice",
    "nf4_dequantize",
    "nf4_quantize",
    "num_groups",
    "quantize_absmax",
    "quantize_blocks",
]

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
    check(flat.dtype in _SOURCE_DTYPES, lambda: f"NF4 quantizes fp32, bf16 and fp16, not {flat.dtype}", TypeError)
    check(flat.dim() == 1, lambda: f"NF4 quantizes the flattened weight, got shape {tuple(flat.shape)}")
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
    check(
        absmax.dtype == offset.dtype == torch.float32 and absmax.dim() == 2 and absmax.shape[1] == BLOCKS_PER_GROUP,
        lambda: (
            f"absmax must be (G, {BLOCKS_PER_GROUP}) fp32 and offset fp32, got {tuple(absmax.shape)} {absmax.dtype}, "
            f"offset {offset.dtype}"
        ),
    )
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


def _writes_out(*parts: Tensor, out: Tensor) -> None:
    """Stand in for the ops that fill `out`, for shape propagation."""


@register(
    "nf4_dequantize_out(Tensor codes, Tensor scales, Tensor group_scale, Tensor offset, *, Tensor(a!) out) -> ()",
    fake=_writes_out,
)
def nf4_dequantize_out(codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, out: Tensor) -> None:
    """Run nf4_dequantize into a contiguous `out` of the weight's shape and dtype, without checks."""
    if not uses_triton(codes):
        out.copy_(nf4_cpu.dequantize(codes, scales, group_scale, offset, shape=tuple(out.shape), dtype=out.dtype))
        return
    from distlora_kernels import nf4_triton

    nf4_triton.dequantize(codes, scales, group_scale, offset, out=out)


@register("nf4_dequantize_blocks_out(Tensor codes, Tensor absmax, *, Tensor(a!) out) -> ()", fake=_writes_out)
def dequantize_blocks_out(codes: Tensor, absmax: Tensor, *, out: Tensor) -> None:
    """Run dequantize_blocks into a contiguous `out` of the weight's shape and dtype, without checks."""
    if not uses_triton(codes):
        out.copy_(nf4_cpu.dequantize_blocks(codes, absmax, shape=tuple(out.shape), dtype=out.dtype))
        return
    from distlora_kernels import nf4_triton

    nf4_triton.dequantize_blocks(codes, absmax, out=out)


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

    Raises:
        RuntimeError: The parts or `out` do not fit `shape`.
    """
    groups = num_groups(math.prod(shape))
    fits = (
        codes.shape == (groups, GROUP_BYTES)
        and scales.shape == (groups, BLOCKS_PER_GROUP)
        and group_scale.shape == (groups,)
    )
    check(
        fits,
        lambda: (
            f"a weight {shape} has {groups} groups; got codes {tuple(codes.shape)}, scales {tuple(scales.shape)}, "
            f"group_scale {tuple(group_scale.shape)}"
        ),
    )
    if out is None and _eagerly_on_cpu(codes):
        return nf4_cpu.dequantize(codes, scales, group_scale, offset, shape=shape, dtype=dtype)
    weight = _place(out, shape, dtype, codes.device)
    nf4_dequantize_out(codes, scales, group_scale, offset, out=weight)
    return weight


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return nf4_dequantize of a weight without double quantization, whose absmax (G, 256) fp32 is stored.

    The result equals bitsandbytes' bit for bit from the same stored bytes. Raises RuntimeError for parts or an `out`
    that do not fit `shape`.
    """
    groups = num_groups(math.prod(shape))
    check(
        codes.shape == (groups, GROUP_BYTES) and absmax.shape == (groups, BLOCKS_PER_GROUP),
        lambda: f"a weight {shape} has {groups} groups; got codes {tuple(codes.shape)}, absmax {tuple(absmax.shape)}",
    )
    if out is None and _eagerly_on_cpu(codes):
        return nf4_cpu.dequantize_blocks(codes, absmax, shape=shape, dtype=dtype)
    weight = _place(out, shape, dtype, codes.device)
    dequantize_blocks_out(codes, absmax, out=weight)
    return weight


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

    Both ends must be block boundaries: an expert's slice of a fused weight. Raises RuntimeError otherwise.
    """
    first, blocks = start // BLOCK, math.prod(shape) // BLOCK
    check(
        start % BLOCK == 0 and math.prod(shape) % BLOCK == 0 and first + blocks <= scales.numel(),
        lambda: f"weights {start} to {start + math.prod(shape)} are not whole blocks of {scales.numel()} x {BLOCK}",
    )
    return nf4_cpu.dequantize_slice(
        codes, scales, group_scale, offset, blocks=slice(first, first + blocks), shape=shape, dtype=dtype
    )


def _eagerly_on_cpu(codes: Tensor) -> bool:
    """Return whether to call nf4_cpu without an op: it allocates its result, and torch.compile cannot trace it."""
    return not uses_triton(codes) and not torch.compiler.is_compiling()


def _place(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tensor to write a weight to: a new one, or `out`, checked, in the weight's shape."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    numel = math.prod(shape)
    if out.numel() != numel or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise RuntimeError(
            f"out must be contiguous, {dtype}, on {device}, with the {numel:,} elements of {shape}; got "
            f"{tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        )
    return out.view(shape)


def bits_per_weight(numel: int) -> float:
    """Return the stored bits per weight, with padding and offset: 4.127 for a large one (4 + 8/64 + 32/16384)."""
    groups = num_groups(numel)
    return 8 * (groups * GROUP_RECORD_BYTES + 4) / numel
