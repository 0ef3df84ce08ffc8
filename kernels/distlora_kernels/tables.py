"""Constants that kernels read from memory, one small buffer of each a device, made at its first use and kept.

Making one copies from the host, which waits for the device: once a process, or once for each set of adapters, not in
each step.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from distlora_kernels import reference


@functools.lru_cache(maxsize=1024)
def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """(N,) fp32: these, as the scales of adapters that rows choose."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@functools.cache
def levels(device: torch.device) -> Tensor:
    """(16,) fp32: the NF4 levels."""
    return torch.tensor(reference.NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """(256,) fp32: the dynamic 8-bit map."""
    return reference.dynamic_map().to(device)


@functools.cache
def dynamic_midpoints(device: torch.device) -> Tensor:
    """(256,) fp32: what an fp32 number must exceed to be nearer to map entry i + 1 than to entry i; the last is inf.

    The midpoint of two entries is exact in fp64 and mostly not in fp32. x > midpoint is x > (midpoint rounded down to
    fp32) for every fp32 x, so the comparison in fp32 is as exact as the reference's in fp64.
    """
    entries = reference.dynamic_map().double()
    exact = (entries[1:] + entries[:-1]) / 2
    rounded = exact.float()
    down = torch.where(rounded.double() > exact, torch.nextafter(rounded, torch.tensor(-math.inf)), rounded)
    return torch.cat((down, torch.tensor([math.inf]))).to(device)
