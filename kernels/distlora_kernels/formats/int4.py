"""4-bit integers with a scale, and perhaps a zero point, per 32, 64 or 128 weights: AWQ, GPTQ, compressed-tensors.

codes (G, 8192) uint8, the first of two weights in the low nibble; scales (G, 16384 / N) bf16 or fp16, as shipped; zeros
(G, 16384 / N) uint8, 0 to 16. w = (code - zero) * scale, where a zero point of 8 is not stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.formats import codes as numbers
from distlora_kernels.formats.base import Part
from distlora_kernels.formats.flat import BlockFormat
from distlora_kernels.reference import GROUP, GROUP_BYTES

ZERO = 8
"""Zero point of the symmetric formats."""


class Int4(BlockFormat):
    """The values of compressed-tensors' pack-quantized, of AWQ and of GPTQ, if the dtype is that of the scales.

    They compute in it; the product is exact in fp32.
    """

    def __init__(self, block: int, scale_dtype: torch.dtype, *, zeros: bool) -> None:
        self.block, self.zeros = block, zeros
        self.name = f"int4_g{block}" + ("_fp16" if scale_dtype == torch.float16 else "") + ("_zeros" if zeros else "")
        self.parts = (Part("codes", (GROUP_BYTES,), torch.uint8), Part("scales", (GROUP // block,), scale_dtype))
        if zeros:
            self.parts += (Part("zeros", (GROUP // block,), torch.uint8),)
        self.levels = tuple(float(code if zeros else code - ZERO) for code in range(16))

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, block)."""
        codes, scales, *zeros = parts
        values = numbers.nibbles(codes, self.levels)
        for zero in zeros:
            values.sub_(zero.float())
        return values.mul_(scales.float())


INT4 = tuple(
    Int4(block, scale_dtype, zeros=zeros)
    for block in (32, 64, 128)
    for scale_dtype in (torch.bfloat16, torch.float16)
    for zeros in (False, True)
)
