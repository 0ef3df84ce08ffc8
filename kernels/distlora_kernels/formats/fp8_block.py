"""FP8 (e4m3) with an fp32 scale per 128 x 128 tile, as DeepSeek and Qwen are shipped. 8.002 bits per weight.

codes (G, 16384) uint8 (float8_e4m3fn), the tile row by row; scales (G,) fp32. Ragged tiles are padded with zeros.
w = fl(e4m3[code] * scale).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.format_layouts import GROUP, TILE
from distlora_kernels.formats.flat import BlockFormat, e4m3, look_up, quantize

LARGEST = 448


class Fp8Block(BlockFormat):
    """The values of transformers' Fp8Dequantize, and of _dequantize_fp8_weight in fp32."""

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n tiles in fp32, (n, 16384)."""
        codes, scales = parts
        return look_up(e4m3(codes.device), codes).mul_(scales)

    def quantize(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return codes and scales of whole tiles, one after the other (`in_tiles`). ValueError for NaN or Inf."""
        return quantize(flat.view(-1, GROUP), LARGEST, torch.float8_e4m3fn)


FP8_BLOCK = Fp8Block.named("fp8_block")


def in_tiles(matrix: Tensor) -> Tensor:
    """Return (O, I) as its tiles, (G, 16384), ragged ones padded with zeros."""
    down, across = FP8_BLOCK.tiles(matrix.shape)
    padding = (0, across * TILE - matrix.shape[1], 0, down * TILE - matrix.shape[0])
    padded = torch.nn.functional.pad(matrix, padding).view(down, TILE, across, TILE)
    return padded.transpose(1, 2).reshape(-1, GROUP)
