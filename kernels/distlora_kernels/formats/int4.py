"""4-bit integers with a scale, and perhaps a zero point, per 32, 64 or 128 weights: AWQ, GPTQ, compressed-tensors.

codes (G, 8192) uint8, the first of two weights in the low nibble; scales (G, 16384 / N) bf16 or fp16, as shipped; zeros
(G, 16384 / N) uint8, 0 to 16. w = (code - zero) * scale, where a zero point of 8 is not stored.
"""

from __future__ import annotations

from torch import Tensor

from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from distlora_kernels.formats import codes as numbers
from distlora_kernels.formats.flat import BlockFormat

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
        values = numbers.nibbles(codes, CODES if zeros else SYMMETRIC)
        for zero in zeros:
            values.sub_(zero.float())
        return values.mul_(scales.float())


INT4 = tuple(Int4.named(name) for name in FORMAT_LAYOUTS if name.startswith("int4_"))
