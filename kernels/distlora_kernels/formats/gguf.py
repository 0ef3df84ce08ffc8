"""Block types of ggml, whose bytes stay as a GGUF file has them (ggml/src/ggml-quants.c, dequantize_row_*).

blocks (G, 16384 / block * bytes) uint8. Blocks of 32 weights have an fp16 scale, and a minimum if they end in _1; those
of 256 (K) have 8 or 16 sub-blocks, whose scales are integers of 4 to 8 bits times an fp16 number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels.formats.flat import BlockFormat

Field = tuple[int, int, int]
"""Bits of every weight, (first byte, bits, run): the lowest bits of `run` bytes, their next ones, then other bytes."""


class Codes(NamedTuple):
    """The place of a block's codes: low and high bits, less an offset; codes of 8 bits have a sign."""

    subs: int
    """Number of sub-blocks."""
    low: Field
    high: Field | None = None
    offset: int = 0


CODES = {
    "q4_0": Codes(1, (2, 4, 16), offset=8),
    "q4_1": Codes(1, (4, 4, 16)),
    "q5_0": Codes(1, (6, 4, 16), (2, 1, 1), offset=16),
    "q5_1": Codes(1, (8, 4, 16), (4, 1, 1)),
    "q8_0": Codes(1, (2, 8, 32)),
    "q2_K": Codes(16, (16, 2, 32)),
    "q3_K": Codes(16, (32, 2, 32), (0, 1, 32), offset=4),
    "q4_K": Codes(8, (16, 4, 32)),
    "q5_K": Codes(8, (48, 4, 32), (16, 1, 32)),
    "q6_K": Codes(16, (0, 4, 64), (128, 2, 32), offset=32),
}


class Gguf(BlockFormat):
    """A block type, with the values of gguf.quants.dequantize: code * factor (+ added)."""

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.group_bytes // self.blocks_per_group

    @property
    def codes(self) -> Codes:
        """Place of the codes in a block."""
        return CODES[self.name]

    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, block)."""
        (blocks,), (subs, low, high, offset) = parts, self.codes
        codes = _read(blocks, low, self.block)
        if high is not None:
            codes |= _read(blocks, high, self.block) << low[1]
        if offset or low[1] == 8:
            codes = codes.view(torch.int8) - offset
        factor, added = self._scales(blocks)
        values = codes.float().view(len(blocks), subs, -1).mul_(factor.unsqueeze(-1))
        return (values if added is None else values.add_(added.unsqueeze(-1))).view(-1, self.block)

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the factors, and what is added, of n blocks: (n, 1) or (n, sub-blocks) fp32."""
        if self.codes.subs == 1:
            return _half(blocks, 0), _half(blocks, 2) if self.name.endswith("_1") else None
        if self.codes.subs == 8:  # Q4_K and Q5_K have 6 bits.
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


GGUF = tuple(map(Gguf.named, CODES))
