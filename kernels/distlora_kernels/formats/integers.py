"""Integers with a scale per block of a row.

4 bits (AWQ, GPTQ, compressed-tensors), with a scale, and perhaps a zero point, per 32, 64 or 128 weights: codes (G,
8192) uint8, the first of two weights in the low nibble; scales (G, 16384 / N) bf16 or fp16, as shipped; zeros
(G, 16384 / N) uint8, 0 to 16. w = (code - zero) * scale, where a zero point of 8 is not stored.

8 bits (our own, for quant=mixed), with an fp32 scale per 128 weights, 8.25 bits per weight: codes (G, 16384) uint8
(int8), scales (G, 128) fp32. w = fl(code * scale) with scale = absmax / 127. On SmolLM2-135M, blocks of 64 have a 13 %
lower error for 0.25 bits, and those of 256 a 12 % higher one for 0.125 less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from distlora_kernels.formats.flat import BlockFormat, nibbles, quantize
from distlora_kernels.reference import GROUP

CODES = tuple(map(float, range(16)))
SYMMETRIC = tuple(code - 8 for code in CODES)
"""Codes less the zero point of the symmetric formats."""


class Int4(BlockFormat):
    """The values of compressed-tensors' pack-quantized, of AWQ and of GPTQ, if the dtype is that of the scales.

    They compute in it; the product is exact in fp32.
    """

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, block)."""
        codes, scales, *zeros = parts
        values = nibbles(codes, CODES if zeros else SYMMETRIC)
        for zero in zeros:
            values.sub_(zero.float())
        return values.mul_(scales.float())


INT4 = tuple(Int4.named(name) for name in FORMAT_LAYOUTS if name.startswith("int4_"))


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
