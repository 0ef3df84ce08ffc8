"""NVFP4: e2m1 codes, one e4m3 scale per 16 weights, and one fp32 number by which a tensor's scales are divided.

codes (G, 8192) uint8, the first of two weights in the low nibble; scales (G, 1024) uint8 (float8_e4m3fn); global_scale
(G,) fp32, so that a weight that is merged of several tensors keeps that of each. 4.502 bits per weight.
w = fl(e2m1[code] * fl(scale / global_scale)). ModelOpt's weight_scale_2 is 1 / global_scale.
"""

from __future__ import annotations

from torch import Tensor

from distlora_kernels.formats import codes as numbers
from distlora_kernels.formats.flat import BlockFormat


class Nvfp4(BlockFormat):
    """The values of compressed-tensors' nvfp4-pack-quantized."""

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, 16)."""
        codes, scales, global_scale = parts
        scale = numbers.look_up(numbers.e4m3(codes.device), scales).div_(global_scale)
        return numbers.nibbles(codes, numbers.E2M1).mul_(scale)


NVFP4 = Nvfp4.named("nvfp4")
