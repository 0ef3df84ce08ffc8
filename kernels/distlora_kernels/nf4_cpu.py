"""Run NF4 on the CPU with the bytes of reference.py, faster (docs/benchmarks.md has the measurements).

Quantizing looks up the one decision level that a weight may exceed, by the weight's bin, instead of searching it.
Dequantizing uses bitsandbytes' C kernel through its registered op if it is installed, else a table of byte values.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.dispatch import in_threads
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP, GROUP_BYTES, NF4_LEVELS, num_groups

PIECE_GROUPS = 16
"""Groups quantized at once: 262,144 weights, whose 3.5 MiB of work memory stay in a core's cache and are reused."""
BINS = 32
"""Bins per half of [-1, 1]. They are narrower than the least distance of two midpoints, 0.08."""


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return reference.quantize_blocks bit for bit, about 4 times as fast as 15 comparisons with all midpoints.

    Each of torch's threads quantizes its pieces: operations on one piece are too short to share between threads.
    """
    flat = flat.detach()  # A tensor written with out= must not be in a graph, and a weight may require grad.
    groups = num_groups(flat.numel())
    codes = torch.empty(groups, GROUP_BYTES, dtype=torch.uint8)
    absmax = torch.empty(groups, BLOCKS_PER_GROUP)
    work = threading.local()

    def quantize(number: int) -> None:
        if not hasattr(work, "memory"):
            work.memory = _QuantizeMemory(min(groups, PIECE_GROUPS))
        piece = slice(number * PIECE_GROUPS, (number + 1) * PIECE_GROUPS)
        work.memory.quantize(flat[piece.start * GROUP : piece.stop * GROUP], codes[piece], absmax[piece])

    in_threads(quantize, range(-(-groups // PIECE_GROUPS)))
    return codes, absmax


class _QuantizeMemory:
    """Reused work memory to quantize some groups."""

    def __init__(self, groups: int) -> None:
        numel = groups * GROUP
        self.values, self.other = torch.empty(numel), torch.empty(numel)
        self.bins = torch.empty(numel, dtype=torch.int32)
        self.index, self.above = torch.empty(numel, dtype=torch.uint8), torch.empty(numel, dtype=torch.bool)
        self.divisors = torch.empty(groups, BLOCKS_PER_GROUP)
        self.one = torch.ones(())

    def quantize(self, flat: Tensor, codes: Tensor, absmax: Tensor) -> None:
        """Fill `codes` (G, 8192) and `absmax` (G, 256); the last group may be partial.

        A bin has one midpoint and the code below it. Every other midpoint is further from the bin's ends than rounding
        can move a weight, so one comparison decides.
        """
        numel = codes.numel() * 2
        values, other, bins = self.values[:numel], self.other[:numel], self.bins[:numel]
        index, above, divisors = self.index[:numel], self.above[:numel], self.divisors[: len(codes)]
        values[: flat.numel()] = flat
        values[flat.numel() :] = 0.0
        torch.abs(values, out=other)
        torch.amax(other.view(len(codes), -1, BLOCK), dim=2, out=absmax)
        # A zero block divided by 1 stays zero, with code 7.
        torch.where(absmax > 0, absmax, self.one, out=divisors)
        values.view(-1, BLOCK).div_(divisors.view(-1, 1))
        codes_below, midpoints = _bins()
        torch.mul(values, BINS, out=other)
        bins.copy_(other)  # Rounds towards zero; a NaN becomes any number, and its block is refused by its absmax.
        bins.clamp_(-BINS, BINS).add_(BINS)
        torch.index_select(codes_below, 0, bins, out=index)
        torch.index_select(midpoints, 0, bins, out=other)
        index += torch.gt(values, other, out=above).view(torch.uint8)
        pairs = index.view(-1, 2)
        torch.add(pairs[:, 1], pairs[:, 0], alpha=16, out=codes.view(-1))


@functools.cache
def _bins() -> tuple[Tensor, Tensor]:
    """Return (2 BINS + 1,) uint8 and fp32: the code below the midpoint nearest to a bin's middle, and that midpoint.

    The bin of zero is two wide.
    """
    number = torch.arange(-BINS, BINS + 1, dtype=torch.float64)
    midpoints = torch.tensor(reference.nf4_midpoints(), dtype=torch.float32)
    nearest = ((number + number.sign() / 2)[:, None] / BINS - midpoints.double()).abs().argmin(dim=1)
    return nearest.to(torch.uint8), midpoints[nearest]


def dequantize(
    codes: Tensor, scales: Tensor, group_scale: Tensor, offset: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return reference.nf4_dequantize bit for bit."""
    absmax = dynamic_map()[scales.int()].mul_(group_scale[:, None]).add_(offset)
    return dequantize_blocks(codes, absmax, shape=shape, dtype=dtype)


def dequantize_blocks(codes: Tensor, absmax: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return reference.dequantize_blocks bit for bit."""
    numel = torch.Size(shape).numel()
    absmax = absmax.view(-1)
    if has_bitsandbytes():
        # As rows of one block: for rows of 32, 96, 160... weights bitsandbytes 0.50's AVX-512 kernel uses wrong absmax.
        blocks = (-(-numel // BLOCK), BLOCK)  # A last one that is not whole has a whole one's bytes.
        packed = codes.view(-1)[: blocks[0] * BLOCK // 2]
        weights = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax[: blocks[0]], BLOCK, "nf4", blocks, dtype)
        return weights.view(-1)[:numel].view(shape)
    weights = _byte_values()[codes.view(-1).int()].view(-1, BLOCK).mul_(absmax[:, None])
    return weights.view(-1)[:numel].view(shape).to(dtype)


@functools.cache
def dynamic_map() -> Tensor:
    """Return reference.dynamic_map, made once."""
    return reference.dynamic_map()


@functools.cache
def _byte_values() -> Tensor:
    """Return (256, 2) fp32: the two levels of every byte."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1)


@functools.cache
def has_bitsandbytes() -> bool:
    """Return whether bitsandbytes is installed; imports it, which registers its ops.

    All code of ours that needs it, or PEFT, which imports it, calls this first.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    # At import it recommends the `kernels` package for a CPU GEMM that we do not use.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _without_compiler(), _without_hub_kernels():
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        warnings.warn(f"bitsandbytes is installed but cannot be imported ({error}); using torch instead", stacklevel=2)
        return False
    finally:
        logger.setLevel(level)
    return True


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Set torch.compile's eager backend during bitsandbytes' import, which otherwise imports TorchInductor."""
    if not hasattr(torch.compiler, "set_default_backend"):  # torch 2.11
        yield
        return
    chosen = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("eager")
    try:
        yield
    finally:
        torch.compiler.set_default_backend(chosen)


@contextlib.contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Let `import kernels` fail during bitsandbytes' import.

    Where the processor has AVX512-BF16 and that package is installed, as transformers requires, the import would
    download a GEMM from the Hub and run it: a request that nobody asked for, by every rank.
    """
    kept = {name: module for name, module in sys.modules.items() if name == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        sys.modules.update(kept)
