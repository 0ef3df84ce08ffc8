"""Keep the constants that kernels read from memory, one small buffer per device, made at first use.

Making one copies from the host, which synchronizes with the device: once per process, or per set of adapters.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from distlora_kernels import reference


@functools.lru_cache(maxsize=1024)
def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers, such as scales of adapters, as (N,) fp32."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@functools.cache
def levels(device: torch.device) -> Tensor:
    """Return the NF4 levels, (16,) fp32."""
    return torch.tensor(reference.NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the dynamic 8-bit map, (256,) fp32."""
    return reference.dynamic_map().to(device)


@functools.cache
def dynamic_midpoints(device: torch.device) -> Tensor:
    """Return (256,) fp32: what an fp32 number must exceed to be nearer to entry i + 1 than to entry i; the last is inf.

    The midpoint of two entries is exact in fp64 and mostly not in fp32. x > midpoint is x > (midpoint rounded down to
    fp32) for every fp32 x, so the comparison in fp32 is as exact as the reference's in fp64.
    """
    entries = reference.dynamic_map().double()
    exact = (entries[1:] + entries[:-1]) / 2
    rounded = exact.float()
    down = torch.where(rounded.double() > exact, torch.nextafter(rounded, torch.tensor(-math.inf)), rounded)
    return torch.cat((down, torch.tensor([math.inf]))).to(device)
