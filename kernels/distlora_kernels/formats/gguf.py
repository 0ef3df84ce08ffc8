"""Block types of ggml, whose bytes stay as a GGUF file has them (ggml/src/ggml-quants.c, dequantize_row_*).

blocks (G, 16384 / block * bytes) uint8. Blocks of 32 weights have an fp16 scale, and a minimum if they end in _1; those
of 256 (K) have 8 or 16 sub-blocks, whose scales are integers of 4 to 8 bits times an fp16 number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distlora_kernels.formats.base import Part
from distlora_kernels.formats.flat import BlockFormat
from distlora_kernels.reference import GROUP

Field = tuple[int, int, int]
"""Bits of every weight, (first byte, bits, run): the lowest bits of `run` bytes, their next ones, then other bytes."""


class Gguf(BlockFormat):
    """A block type, with the values of gguf.quants.dequantize: code * factor (+ added)."""

    def __init__(
        self, name: str, block: int, nbytes: int, subs: int, low: Field, high: Field | None = None, offset: int = 0
    ) -> None:
        self.name, self.block, self.nbytes, self.subs = name, block, nbytes, subs
        self.low, self.high, self.offset = low, high, offset
        """A code is its low and high bits, less the offset; one of 8 bits has a sign."""
        self.parts = (Part("blocks", (GROUP // block * nbytes,), torch.uint8),)

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, block)."""
        (blocks,) = parts
        codes = _read(blocks, self.low, self.block)
        if self.high is not None:
            codes |= _read(blocks, self.high, self.block) << self.low[1]
        if self.offset or self.low[1] == 8:
            codes = codes.view(torch.int8) - self.offset
        factor, added = self._scales(blocks)
        values = codes.float().view(len(blocks), self.subs, -1).mul_(factor.unsqueeze(-1))
        return (values if added is None else values.add_(added.unsqueeze(-1))).view(-1, self.block)

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the factors, and what is added, of n blocks: (n, 1) or (n, sub-blocks) fp32."""
        if self.subs == 1:
            return _half(blocks, 0), _half(blocks, 2) if self.name.endswith("_1") else None
        if self.subs == 8:  # Q4_K and Q5_K have 6 bits.
            low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
            scale = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
            least = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=1)
            return _half(blocks, 0) * scale, -(_half(blocks, 2) * least)
        if self.name == "q2_K":
            return _half(blocks, 80) * (blocks[:, :16] & 15), -(_half(blocks, 82) * (blocks[:, :16] >> 4))
        if self.name == "q3_K":
            scale = _read(blocks, (96, 4, 8), 16) | (_read(blocks, (104, 2, 4), 16) << 4)
            return _half(blocks, 108) * (scale.view(torch.int8) - 32), None
        return _half(blocks, 208) * blocks[:, 192:208].view(torch.int8), None  # Q6_K.


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the fp16 number at a byte of each block in fp32, (n, 1)."""
    return blocks[:, start : start + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _read(blocks: Tensor, field: Field, count: int) -> Tensor:
    """Return a field's `count` numbers of each block, (n, count) uint8. Runs of 8 bytes are shifted at once."""
    start, bits, run = field
    stored = blocks[:, start : start + count * bits // 8].clone(memory_format=torch.contiguous_format)
    dtype, mask = torch.uint8, (1 << bits) - 1
    if run % 8 == 0:
        dtype, run, mask = torch.int64, run // 8, int.from_bytes(bytes([mask] * 8), "little", signed=True)
    words = stored.view(dtype).view(len(blocks), -1, 1, run)
    return torch.cat([(words >> shift) & mask for shift in range(0, 8, bits)], dim=2).view(torch.uint8).view(-1, count)


GGUF = (
    Gguf("q4_0", 32, 18, 1, (2, 4, 16), offset=8),
    Gguf("q4_1", 32, 20, 1, (4, 4, 16)),
    Gguf("q5_0", 32, 22, 1, (6, 4, 16), (2, 1, 1), offset=16),
    Gguf("q5_1", 32, 24, 1, (8, 4, 16), (4, 1, 1)),
    Gguf("q8_0", 32, 34, 1, (2, 8, 32)),
    Gguf("q2_K", 256, 84, 16, (16, 2, 32)),
    Gguf("q3_K", 256, 110, 16, (32, 2, 32), (0, 1, 32), offset=4),
    Gguf("q4_K", 256, 144, 8, (16, 4, 32)),
    Gguf("q5_K", 256, 176, 8, (48, 4, 32), (16, 1, 32)),
    Gguf("q6_K", 256, 210, 16, (0, 4, 64), (128, 2, 32), offset=32),
)
