"""4-bit floating point: e2m1 codes (G, 8192) uint8, the first of two weights in the low nibble, and scales of blocks.

MXFP4 (OCP Microscaling Formats 1.0, as gpt-oss is shipped): one power of two per 32 weights, scales (G, 512) uint8
(ue8m0). 4.25 bits per weight. w = e2m1[code] * 2^(scale - 127), exact in fp32 and bf16. Scale 255, OCP's NaN, is 2^128
as in transformers.

NVFP4: one e4m3 scale per 16 weights, and one fp32 number by which a tensor's scales are divided. scales (G, 1024) uint8
(float8_e4m3fn); global_scale (G,) fp32, so that a weight that is merged of several tensors keeps that of each. 4.502
bits per weight. w = fl(e2m1[code] * fl(scale / global_scale)). ModelOpt's weight_scale_2 is 1 / global_scale.
"""

from __future__ import annotations

from torch import Tensor

from distlora_kernels.formats.flat import E2M1, BlockFormat, e4m3, half_e8m0, look_up, nibbles

DOUBLED = tuple(2 * level for level in E2M1)


class Mxfp4(BlockFormat):
    """The values of transformers' convert_moe_packed_tensors, and of compressed-tensors' mxfp4-pack-quantized."""

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, 32)."""
        codes, scales = parts
        return nibbles(codes, DOUBLED).mul_(look_up(half_e8m0(codes.device), scales))


MXFP4 = Mxfp4.named("mxfp4")


class Nvfp4(BlockFormat):
    """The values of compressed-tensors' nvfp4-pack-quantized."""

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, 16)."""
        codes, scales, global_scale = parts
        scale = look_up(e4m3(codes.device), scales).div_(global_scale)
        return nibbles(codes, E2M1).mul_(scale)


NVFP4 = Nvfp4.named("nvfp4")
