"""Memory for dequantized weights: on a GPU one arena a device and stream, reused by every linear.

A weight that is dequantized lives until the next one is: kernels of a stream run in order, so the GEMM that reads it is
done before it is overwritten. Where the block's weights are to be kept from recomputation to backward (`keeping`), each
has a place of its own. On the CPU a weight is an ordinary tensor: malloc is told to keep its pages by the launcher.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from distlora_kernels.dispatch import uses_triton
from distlora_kernels.operands import FrozenWeight

_ALIGNMENT = 512
"""Bytes at which kept weights start: more than any load is wide."""


@dataclass(slots=True)
class Arena:
    """The scratch of one stream."""

    device: torch.device
    one: Tensor = field(init=False)
    """Bytes for the weight that is in use."""
    kept: Tensor = field(init=False)
    """Bytes for the weights of the block that is being recomputed, one after the other."""
    kept_bytes: int = 0
    """How much of it is taken."""

    def __post_init__(self) -> None:
        self.one = self.kept = torch.empty(0, dtype=torch.uint8, device=self.device)

    def take_one(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(shape) in `dtype`, unfilled, until the next call."""
        nbytes = _nbytes(shape, dtype)
        if self.one.numel() < nbytes:
            self.one = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self.one[:nbytes].view(dtype).view(shape)

    def take_kept(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(shape) in `dtype`, unfilled, until `start_keeping`."""
        nbytes, start = _nbytes(shape, dtype), self.kept_bytes
        self.kept_bytes = start + _aligned(nbytes)
        if self.kept.numel() < self.kept_bytes:
            # Weights that are kept in the smaller buffer hold it until their backward is done.
            self.kept = torch.empty(self.kept_bytes, dtype=torch.uint8, device=self.device)
        return self.kept[start : start + nbytes].view(dtype).view(shape)

    def start_keeping(self) -> None:
        """Another block is recomputed: what was kept of the last one is used up."""
        self.kept_bytes = 0


_arenas: dict[tuple[torch.device, int], Arena] = {}
_keeping: Literal["off", "forward", "recomputation"] = "off"


def arena(device: torch.device) -> Arena:
    """The arena of the device's current stream."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _arenas:
        _arenas[device, stream] = Arena(device)
    return _arenas[device, stream]


def reserve(device: torch.device, *, largest: int, block: int = 0) -> int:
    """Take the arena's memory before the first step: for the largest weight that is dequantized, and for a block's
    weights where they are kept (`block_bytes`), in bytes. Returns the bytes that the arena then holds.
    """
    own = arena(device)
    own.one = torch.empty(largest, dtype=torch.uint8, device=device)
    own.kept = torch.empty(block, dtype=torch.uint8, device=device)
    return own.one.nbytes + own.kept.nbytes


def block_bytes(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
    """What an arena needs to keep weights of these shapes."""
    return sum(_aligned(_nbytes(shape, dtype)) for shape in shapes)


@contextlib.contextmanager
def keeping(part: Literal["forward", "recomputation"], device: torch.device) -> Iterator[None]:
    """Around a block's forward and its recomputation: what the recomputation dequantizes is kept for the backward.

    The linears then save their dequantized weights. In forward the checkpoint drops what is saved, so that nothing is
    held; in recomputation it hands it to the backward that asked for it. Only for blocks under a checkpoint.
    """
    global _keeping
    if part == "recomputation":
        arena(device).start_keeping()
    before, _keeping = _keeping, part
    try:
        yield
    finally:
        _keeping = before


class DenseWeights:
    """The dequantized weights of the linears of one input: asked for in forward, and again in backward."""

    def __init__(self, num_linears: int) -> None:
        self.saved: list[Tensor | None] = [None] * num_linears
        """What backward need not dequantize again."""

    def take(self, index: int, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        """The weight of linear `index` (O, I) in `dtype`; on a GPU until the next one is taken."""
        if (dense := self.saved[index]) is not None:
            return dense
        if not weight.packed:
            return weight.dense(dtype)
        first, place = weight.parts[0], None
        if uses_triton(first) and not torch.compiler.is_compiling():  # A graph has memory of its own.
            own = arena(first.device)
            place = (own.take_kept if _keeping == "recomputation" else own.take_one)(weight.shape, dtype)
        dense = weight.dense(dtype, place)
        if _keeping != "off":
            self.saved[index] = dense
        return dense


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
