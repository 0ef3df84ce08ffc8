"""NF4 on the CPU: the same bytes as reference.py, sooner. Measured figures are in README.md.

Quantizing looks up the one decision level that a weight may be above, by the weight itself, instead of searching it.
Dequantizing uses bitsandbytes' C kernel through its registered op where it is installed, else a table of byte values.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distlora_kernels import reference
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP, GROUP, GROUP_BYTES, NF4_LEVELS, num_groups
from distlora_kernels.threads import threads_of_one

PIECE_GROUPS = 16
"""Groups that are quantized at once: 262,144 weights, whose work of 3.5 MiB stays in a core's cache and is used again
for the next; with fresh memory for each million weights half of the time went into page faults (2026-11-26)."""
MOST_THREADS = 16
"""Which each have as much memory to work in."""
BINS = 32
"""Of each half of [-1, 1]. They are narrower than the least distance of two midpoints, 0.08."""


def quantize_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """reference.quantize_blocks, bit for bit, about 4 times as fast as 15 comparisons with all midpoints.

    Each of torch's threads quantizes pieces of its own. Shared, operations of 50 us on a piece that is in one core's
    cache gained nothing from a second thread: 135 ms and 270 of the CPU for 2^25 weights where one takes 151, and these
    75 and 140 (2026-11-26).
    """
    flat = flat.detach()  # What is written with out= must not be in a graph, and a weight may still be trained.
    groups = num_groups(flat.numel())
    codes = torch.empty(groups, GROUP_BYTES, dtype=torch.uint8)
    absmax = torch.empty(groups, BLOCKS_PER_GROUP)
    pieces = [slice(first, min(first + PIECE_GROUPS, groups)) for first in range(0, groups, PIECE_GROUPS)]

    inference = torch.is_inference_mode_enabled()

    def quantize(own: Sequence[slice]) -> None:
        with torch.inference_mode(inference):  # A thread does not have its caller's mode.
            work = _Work(min(groups, PIECE_GROUPS))
            for piece in own:
                work.quantize(flat[piece.start * GROUP : piece.stop * GROUP], codes[piece], absmax[piece])

    threads = min(torch.get_num_threads(), len(pieces), MOST_THREADS)
    if threads < 2:
        quantize(pieces)
    else:
        with threads_of_one(threads) as pool:
            list(pool.map(quantize, [pieces[number::threads] for number in range(threads)]))
    return codes, absmax


class _Work:
    """Memory to quantize some groups in, again and again."""

    def __init__(self, groups: int) -> None:
        numel = groups * GROUP
        self.values, self.other = torch.empty(numel), torch.empty(numel)
        self.bins = torch.empty(numel, dtype=torch.int32)
        self.index, self.above = torch.empty(numel, dtype=torch.uint8), torch.empty(numel, dtype=torch.bool)
        self.divisors = torch.empty(groups, BLOCKS_PER_GROUP)
        self.one = torch.ones(())

    def quantize(self, flat: Tensor, codes: Tensor, absmax: Tensor) -> None:
        """Fill `codes` (G, 8192) and `absmax` (G, 256); the last group may lack weights.

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
        # A zero block divided by 1 stays zero, whose code is 7 as it must be.
        torch.where(absmax > 0, absmax, self.one, out=divisors)
        values.view(-1, BLOCK).div_(divisors.view(-1, 1))
        codes_below, midpoints = _bins()
        torch.mul(values, BINS, out=other)
        bins.copy_(other)  # Towards zero; a NaN becomes any number, and its block is refused by its absmax.
        bins.clamp_(-BINS, BINS).add_(BINS)
        torch.index_select(codes_below, 0, bins, out=index)
        torch.index_select(midpoints, 0, bins, out=other)
        index += torch.gt(values, other, out=above).view(torch.uint8)
        pairs = index.view(-1, 2)
        torch.add(pairs[:, 1], pairs[:, 0], alpha=16, out=codes.view(-1))


@functools.cache
def _bins() -> tuple[Tensor, Tensor]:
    """(2 BINS + 1,) uint8 and fp32: the midpoint that is nearest to a bin's middle, and the code of what is not above
    it. The bin of zero is two wide."""
    number = torch.arange(-BINS, BINS + 1, dtype=torch.float64)
    midpoints = torch.tensor(reference.nf4_midpoints(), dtype=torch.float32)
    nearest = ((number + number.sign() / 2)[:, None] / BINS - midpoints.double()).abs().argmin(dim=1)
    return nearest.to(torch.uint8), midpoints[nearest]


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
