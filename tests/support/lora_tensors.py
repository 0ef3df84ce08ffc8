"""Tensors of an adapted linear."""

from __future__ import annotations

import torch
from torch import Tensor


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x (M, I), weight (O, I), a (R, I), b (O, R), bias (O,); adapters at least in fp32."""
    m, i, o, r = shape
    generator = torch.Generator().manual_seed(1)
    x, weight, a, b, bias = (torch.randn(s, generator=generator) for s in ((m, i), (o, i), (r, i), (o, r), (o,)))
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), weight.to(dtype) / i**0.5, a.to(master) / i**0.5, b.to(master), bias.to(dtype)
