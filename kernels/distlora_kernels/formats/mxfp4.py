"""MXFP4: e2m1 codes, and one power of two per 32 weights (OCP Microscaling Formats 1.0), as gpt-oss is shipped.

codes (G, 8192) uint8, the first of two weights in the low nibble; scales (G, 512) uint8 (ue8m0). 4.25 bits per weight.
w = e2m1[code] * 2^(scale - 127), exact in fp32 and bf16. Scale 255, OCP's NaN, is 2^128 as in transformers.
"""

from __future__ import annotations

from torch import Tensor

from distlora_kernels.formats import codes as numbers
from distlora_kernels.formats.flat import BlockFormat

DOUBLED = tuple(2 * level for level in numbers.E2M1)


class Mxfp4(BlockFormat):
    """The values of transformers' convert_moe_packed_tensors, and of compressed-tensors' mxfp4-pack-quantized."""

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, 32)."""
        codes, scales = parts
        return numbers.nibbles(codes, DOUBLED).mul_(numbers.look_up(numbers.half_e8m0(codes.device), scales))


MXFP4 = Mxfp4.named("mxfp4")
