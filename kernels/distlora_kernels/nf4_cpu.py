"""NF4 on the CPU: the same bytes as reference.py, sooner. Measured figures are in README.md.

Quantizing counts the decision levels below each weight (15 vectorized comparisons) instead of searching them.
Dequantizing uses bitsandbytes' C kernel through its registered op where it is installed, else a table of byte values.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP, GROUP_BYTES, NF4_LEVELS, num_groups

_MIDPOINTS = reference.nf4_midpoints()


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """reference.quantize_blocks, about 2.5 times as fast as torch.bucketize or bitsandbytes on one core."""
    groups = num_groups(flat.numel())
    if flat.numel() == groups * GROUP:
        blocks = flat.view(-1, BLOCK).float()
    else:
        padded = torch.zeros(groups * GROUP, dtype=torch.float32)
        padded[: flat.numel()] = flat
        blocks = padded.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    # A zero block divided by 1 stays zero, whose code is 7 as it must be.
    normalized = blocks / torch.where(absmax > 0, absmax, 1.0)
    index = torch.zeros(normalized.shape, dtype=torch.uint8)
    above = torch.empty(normalized.shape, dtype=torch.bool)
    for midpoint in _MIDPOINTS:
        torch.gt(normalized, midpoint, out=above)
        index += above.view(torch.uint8)
    pairs = index.view(-1, 2)
    codes = torch.add(pairs[:, 1], pairs[:, 0], alpha=16)
    return codes.view(groups, GROUP_BYTES), absmax.view(groups, BLOCKS_PER_GROUP)


def dequantize(
    codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """reference.nf4_dequantize, bit for bit."""
    absmax = _dynamic_map()[scales.int()].mul_(group_scale[:, None]).add_(offset)
    return dequantize_blocks(codes, absmax, shape=shape, dtype=dtype)


def dequantize_slice(
    codes: Tensor,
    scales: Tensor,
    group_scale: Tensor,
    offset: Tensor,
    *,
    blocks: slice,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The weights of some neighbouring blocks, which fill `shape`: the same bits as `dequantize` gives them."""
    of_block = group_scale[torch.arange(blocks.start, blocks.stop) // BLOCKS_PER_GROUP]
    absmax = _dynamic_map()[scales.view(-1)[blocks].int()].mul_(of_block).add_(offset)
    half = BLOCK // 2
    own = codes.view(-1)[blocks.start * half : blocks.stop * half]
    return dequantize_blocks(own, absmax, shape=shape, dtype=dtype)


def dequantize_blocks(codes: Tensor, absmax: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """reference.dequantize_blocks, bit for bit."""
    numel = torch.Size(shape).numel()
    absmax = absmax.view(-1)
    if numel % BLOCK == 0 and has_bitsandbytes():
        # As rows of one block each: for rows of 32, 96, 160... weights bitsandbytes 0.50's kernel takes a wrong absmax.
        blocks = (numel // BLOCK, BLOCK)
        packed = codes.view(-1)[: numel // 2]
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax[: blocks[0]], BLOCK, "nf4", blocks, dtype).view(
            shape
        )
    weights = _byte_values()[codes.view(-1).int()].view(-1, BLOCK).mul_(absmax[:, None])
    return weights.view(-1)[:numel].view(shape).to(dtype)


@functools.cache
def _dynamic_map() -> Tensor:
    return reference.dynamic_map()


@functools.cache
def _byte_values() -> Tensor:
    """(256, 2) fp32: the two levels of every byte."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1)


@functools.cache
def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed; imports it, which registers its ops."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    # At import it advises to install the `kernels` package for a CPU GEMM that we do not use.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _without_compiler():
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        warnings.warn(f"bitsandbytes is installed but cannot be imported ({error}); using torch instead", stacklevel=2)
        return False
    finally:
        logger.setLevel(level)
    return True


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """bitsandbytes decorates functions that nothing here calls with torch.compile, which imports TorchInductor for the
    default backend: 0.65 of the 4.8 CPU seconds of a worker's start (2026-11-25)."""
    if not hasattr(torch.compiler, "set_default_backend"):  # torch 2.11
        yield
        return
    chosen = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("eager")
    try:
        yield
    finally:
        torch.compiler.set_default_backend(chosen)
