"""Provide memory for dequantized weights: on a GPU one arena per device and stream, reused by every linear.

A dequantized weight is valid until the next one is taken: kernels of a stream run in order, so the GEMM that reads it
is done before it is overwritten. With `keeping`, a layer's weights are kept from recomputation to backward, each in its
own place. On the CPU a weight is an ordinary tensor; the launcher configures malloc to keep freed pages.
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
from distlora_kernels.nf4 import dequantize_beside
from distlora_kernels.operands import FrozenWeight

_ALIGNMENT = 512
"""Alignment of kept weights, in bytes: wider than any load."""


@dataclass(slots=True)
class Arena:
    """The scratch memory of one stream."""

    device: torch.device
    one: Tensor = field(init=False)
    """Memory of the weight in use."""
    kept: Tensor = field(init=False)
    """Memory of the weights of the layer that is being recomputed, one after the other."""
    kept_bytes: int = 0
    """Bytes of `kept` in use."""

    def __post_init__(self) -> None:
        self.one = self.kept = torch.empty(0, dtype=torch.uint8, device=self.device)

    def take_one(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory of this shape and dtype, valid until the next call."""
        nbytes = _nbytes(shape, dtype)
        if self.one.numel() < nbytes:
            self.one = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self.one[:nbytes].view(dtype).view(shape)

    def take_kept(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory of this shape and dtype, valid until `start_keeping`."""
        nbytes, start = _nbytes(shape, dtype), self.kept_bytes
        self.kept_bytes = start + _aligned(nbytes)
        if self.kept.numel() < self.kept_bytes:
            # Weights in the smaller buffer keep it alive until their backward is done.
            self.kept = torch.empty(self.kept_bytes, dtype=torch.uint8, device=self.device)
        return self.kept[start : start + nbytes].view(dtype).view(shape)

    def start_keeping(self) -> None:
        """Release the kept weights: the next layer is recomputed."""
        self.kept_bytes = 0


_arenas: dict[tuple[torch.device, int], Arena] = {}
_keeping: Literal["off", "forward", "recomputation"] = "off"


def arena(device: torch.device) -> Arena:
    """Return the arena of the device's current stream."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _arenas:
        _arenas[device, stream] = Arena(device)
    return _arenas[device, stream]


def reserve(device: torch.device, *, largest: int, block: int = 0) -> int:
    """Allocate the arena before the first step. Returns the bytes that it holds.

    `largest` is the size of the largest dequantized weight, `block` that of a layer's kept weights (`block_bytes`).
    """
    reserved = arena(device)
    reserved.one = torch.empty(largest, dtype=torch.uint8, device=device)
    reserved.kept = torch.empty(block, dtype=torch.uint8, device=device)
    return reserved.one.nbytes + reserved.kept.nbytes


def block_bytes(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Return the bytes that an arena needs to keep weights of these shapes."""
    return sum(_aligned(_nbytes(shape, dtype)) for shape in shapes)


def keeps() -> bool:
    """Return whether dequantized weights are kept now."""
    return _keeping != "off"


@contextlib.contextmanager
def keeping(part: Literal["forward", "recomputation"], device: torch.device) -> Iterator[None]:
    """Keep the weights that a layer's recomputation dequantizes for its backward; enter around both parts.

    The linears then save their dequantized weights. In forward, activation checkpointing drops saved tensors, so
    nothing is held; in recomputation it passes them to backward. Only for layers under activation checkpointing.
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
    """The dequantized weights of the linears of one input, in forward and in backward."""

    def __init__(self, num_linears: int) -> None:
        self.saved: list[Tensor | None] = [None] * num_linears
        """Dense weights by linear that backward need not dequantize again."""

    def take(self, index: int, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        """Return the weight of linear `index` (O, I) in `dtype`; on a GPU it is valid until the next one is taken."""
        if (dense := self.saved[index]) is not None:
            return dense
        if not weight.quantized:
            return weight.dense(dtype)
        first, place = weight.parts[0], None
        if uses_triton(first):
            stream_arena = arena(first.device)
            place = (stream_arena.take_kept if _keeping == "recomputation" else stream_arena.take_one)(
                weight.shape, dtype
            )
        dense = weight.dense(dtype, place)
        if _keeping != "off":
            self.saved[index] = dense
        return dense

    def extends(self, index: int, weight: FrozenWeight) -> bool:
        """Return whether the weight is dequantized for one product, into scratch that can have room for an adapter."""
        return weight.quantized and self.saved[index] is None and _keeping == "off" and uses_triton(weight.parts[0])

    def take_beside(self, weight: FrozenWeight, b: Tensor, *, first_rank: int, columns: int) -> Tensor:
        """Return [W | 0 b 0] (O, I + `columns`), b (O, R) from column I + `first_rank` on, valid as `take`'s."""
        out, features = weight.shape
        dense = arena(b.device).take_one((out, features + columns), b.dtype)
        dequantize_beside(weight.parts, weight.shape, b, first_rank=first_rank, out=dense)
        return dense

    def take_above(self, weight: FrozenWeight, dtype: torch.dtype, *, rows: int) -> Tensor:
        """Return (O + `rows`, I): W, and uninitialized rows below, valid as `take`'s."""
        out, features = weight.shape
        dense = arena(weight.parts[0].device).take_one((out + rows, features), dtype)
        weight.dense(dtype, dense[:out])
        return dense


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
