"""8-bit integers with an fp32 scale per 128 weights, 8.25 bits per weight: our own format, for quant=mixed.

codes (G, 16384) uint8 (int8), scales (G, 128) fp32. w = fl(code * scale) with scale = absmax / 127. On SmolLM2-135M,
blocks of 64 have a 13 % lower error for 0.25 bits, and those of 256 a 12 % higher one for 0.125 less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.formats.flat import BlockFormat, quantize
from distlora_kernels.reference import GROUP

LARGEST = 127


class Int8(BlockFormat):
    """Symmetric, with the nearest code, ties to even."""

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, 128)."""
        codes, scales = parts
        return codes.view(torch.int8).float().mul_(scales)

    def quantize(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return codes and scales of flat weights (n,). Raises ValueError for NaN or Inf."""
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, self.block)
        codes, scales = quantize(blocks, LARGEST, torch.int8)
        return codes.view(-1, GROUP), scales.view(-1, self.blocks_per_group)


INT8 = Int8.named("int8")
