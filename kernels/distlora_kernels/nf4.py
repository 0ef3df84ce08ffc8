"""Contract of NF4 with double quantization: what goes in and out, checked; picks the CPU path or the Triton kernels.

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
"""Stored bytes of a group: its codes, scales and group_scale."""
PLAIN_RECORD_BYTES = GROUP_BYTES + 4 * BLOCKS_PER_GROUP
"""Stored bytes of a group without double quantization: its codes and absmax."""

_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """First level of a run of whole groups: flat (n,) fp32, bf16 or fp16 -> codes (G, 8192) uint8, absmax (G, 256)
    fp32.

    Equal to bitsandbytes byte for byte. n need not be a multiple of 16,384: the last group is padded with zeros,
    whose code is 7.
    """
    check(flat.dtype in _SOURCE_DTYPES, lambda: f"NF4 quantizes fp32, bf16 and fp16, not {flat.dtype}", TypeError)
    check(flat.dim() == 1, lambda: f"NF4 quantizes the flattened weight, got shape {tuple(flat.shape)}")
    if not uses_triton(flat):
        return nf4_cpu.quantize_blocks(flat)
    from distlora_kernels import nf4_triton

    with on_device_of(flat):
        return nf4_triton.quantize_blocks(flat)


def quantize_absmax(absmax: Tensor, offset: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Second level of a run of whole groups: absmax (G, 256) fp32 and the tensor's offset () fp32 -> scales (G, 256)
    uint8, group_scale (G,) fp32.

    scale = exactly nearest entry of the dynamic map, ties to the lower index. Blocks from `num_blocks` on are padding.
    absmax must be finite: what NaN and Inf give means nothing.
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


def _writes_out(*parts: Tensor, out: Tensor) -> None:
    """Fake of the ops that fill `out` and return nothing."""


@register(
    "nf4_dequantize_out(Tensor codes, Tensor scales, Tensor group_scale, Tensor offset, *, Tensor(a!) out) -> ()",
    fake=_writes_out,
)
def nf4_dequantize_out(codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, out: Tensor) -> None:
    """nf4_dequantize into a contiguous `out`, whose shape and dtype are the weight's. Shapes go unchecked."""
    if not uses_triton(codes):
        out.copy_(nf4_cpu.dequantize(codes, scales, group_scale, offset, shape=tuple(out.shape), dtype=out.dtype))
        return
    from distlora_kernels import nf4_triton

    nf4_triton.dequantize(codes, scales, group_scale, offset, out=out)


@register("nf4_dequantize_blocks_out(Tensor codes, Tensor absmax, *, Tensor(a!) out) -> ()", fake=_writes_out)
def dequantize_blocks_out(codes: Tensor, absmax: Tensor, *, out: Tensor) -> None:
    """dequantize_blocks into a contiguous `out`, whose shape and dtype are the weight's. Shapes go unchecked."""
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
    """The weight (shape) in `dtype` (fp32, bf16, fp16): fl(level * absmax) in fp32, rounded to nearest even once.

    Written into `out` where it is given: contiguous, of that dtype and as many elements, of any shape; the result is a
    view of it. Equal to bitsandbytes bit for bit from the same stored bytes. Raises RuntimeError for parts or an `out`
    that do not fit `shape`.
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
    """nf4_dequantize of a weight without double quantization: absmax (G, 256) fp32, one a block, is stored itself.

    Equal to bitsandbytes bit for bit from the same stored bytes. Raises RuntimeError for parts or an `out` that do not
    fit `shape`.
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
    """The weights from `start` on that fill `shape`, bit for bit those of the whole; for tensors on the CPU.

    Both ends must be borders of blocks, not of groups: an expert's slice of a fused weight. Raises RuntimeError else.
    """
    first, blocks = start // BLOCK, math.prod(shape) // BLOCK
    check(
        start % BLOCK == 0 and math.prod(shape) % BLOCK == 0 and first + blocks <= scales.numel(),
        lambda: f"weights {start} to {start + math.prod(shape)} are no whole blocks of {scales.numel()} x {BLOCK}",
    )
    return nf4_cpu.dequantize_slice(
        codes, scales, group_scale, offset, blocks=slice(first, first + blocks), shape=shape, dtype=dtype
    )


def _eagerly_on_cpu(codes: Tensor) -> bool:
    """Where nf4_cpu is called without an op between: it makes its result itself, and torch.compile cannot trace it."""
    return not uses_triton(codes) and not torch.compiler.is_compiling()


def _place(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where a weight is written: a new tensor, or `out`, checked, in the weight's shape."""
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
    """Stored bits a weight, padding and offset included: 4.127 for a large one (4 + 8/64 + 32/16384)."""
    groups = num_groups(numel)
    return 8 * (groups * GROUP_RECORD_BYTES + 4) / numel
