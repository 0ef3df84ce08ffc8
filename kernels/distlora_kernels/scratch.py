"""Provide memory for dequantized weights: on a GPU one buffer per device and stream, reused by every linear.

A dequantized weight is valid until the next one is taken: kernels of a stream run in order, so the GEMM that reads it
is done before it is overwritten. On the CPU a weight is an ordinary tensor; the launcher configures malloc to keep
freed pages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distlora_kernels.dispatch import uses_triton
from distlora_kernels.formats.nf4 import Nf4, dequantize_beside
from distlora_kernels.operands import FrozenWeight

_buffers: dict[tuple[torch.device, int], Tensor] = {}


def _key(device: torch.device) -> tuple[torch.device, int]:
    if device.type != "cuda":
        return device, 0
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.current_stream(device).cuda_stream


def reserve(device: torch.device, nbytes: int) -> None:
    """Allocate the buffer of the device's current stream, before the first step needs it."""
    _buffers[_key(device)] = torch.empty(nbytes, dtype=torch.uint8, device=device)


def buffer(device: torch.device, nbytes: int = 0) -> Tensor:
    """Return the buffer of the device's current stream, of at least so many bytes."""
    key = _key(device)
    if key not in _buffers or _buffers[key].numel() < nbytes:
        reserve(device, nbytes)
    return _buffers[key]


def _place(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized memory of this shape and dtype, valid until the next call."""
    nbytes = math.prod(shape) * dtype.itemsize
    return buffer(device, nbytes)[:nbytes].view(dtype).view(shape)


def take(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (O, I) in `dtype`; on a GPU it is valid until the next one is taken."""
    return weight.dense(dtype, _place(weight.shape, dtype, weight.parts[0].device) if extends(weight) else None)


def extends(weight: FrozenWeight) -> bool:
    """Return whether the weight is dequantized into the buffer, which can have room for an adapter below it."""
    return weight.format is not None and uses_triton(weight.parts[0])


def take_beside(weight: FrozenWeight, b: Tensor, *, first_rank: int, columns: int) -> Tensor:
    """Return [W | 0 b 0] (O, I + `columns`) of a weight in NF4; b (O, R) is at column I + `first_rank`.

    It is valid as `take`'s.
    """
    out, features = weight.shape
    dense = _place((out, features + columns), b.dtype, b.device)
    assert isinstance(weight.format, Nf4)
    dequantize_beside(weight.format, weight.parts, weight.shape, b, first_rank=first_rank, out=dense)
    return dense


def take_chosen(weight: FrozenWeight, dtype: torch.dtype, ends: Tensor) -> Tensor:
    """Return the weight of all experts (E, O, I), of which those without rows may be undefined; valid as `take`'s.

    ends (E,) int32: end of each expert's rows.
    """
    if weight.format is None:
        return take(weight, dtype)
    device = weight.parts[0].device
    dense = _place(weight.shape, dtype, device) if extends(weight) else torch.empty(weight.shape, dtype=dtype)
    weight.format.dequantize_chosen(weight.parts, ends, dense)
    return dense


def take_above(weight: FrozenWeight, dtype: torch.dtype, *, rows: int) -> Tensor:
    """Return (O + `rows`, I): W, and uninitialized rows below, valid as `take`'s."""
    out, features = weight.shape
    dense = _place((out + rows, features), dtype, weight.parts[0].device)
    weight.dense(dtype, dense[:out])
    return dense
