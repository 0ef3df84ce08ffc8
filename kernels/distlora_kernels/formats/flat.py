"""Decode blocks on the CPU: a piece of blocks at a time, each thread its own pieces; rows of an embedding; quantize.

A format decodes blocks to fp32, in which its formula is exact or the reference library's; the result is rounded once.
At the end of the file are the tables of the numbers that codes stand for, one copy per device.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from distlora_kernels.dispatch import in_threads, on_device_of, uses_triton
from distlora_kernels.formats.base import Format, place
from distlora_kernels.reference import GROUP

PIECE = 16 * GROUP
"""Weights that are decoded at once: 1 MiB in fp32, which stays in a core's cache. Of a tiled format, a row of tiles."""
GPU_PIECE = 2**22
"""Weights of an embedding's rows that a GPU decodes at once: 16 MiB in fp32, several times."""


class BlockFormat(Format):
    """A format whose blocks are decoded one by one, and in Triton by dequantize_triton.py."""

    @abstractmethod
    def decode(self, *parts: Tensor) -> Tensor:
        """Return n blocks in fp32, (n, block). A part has what is stored for each of them: (n, numbers)."""

    def dequantize(
        self, parts: Sequence[Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return the weight in `dtype`: the format's fp32 value, rounded to nearest even once."""
        self.check(parts, shape)
        weight = place(out, shape, dtype, parts[0].device)
        if uses_triton(parts[0]):
            with on_device_of(parts[0]):
                self.run_triton(parts, weight)
            return weight
        return self.decode_into(weight, parts)

    def run_triton(self, parts: Sequence[Tensor], out: Tensor, ends: Tensor | None = None) -> None:
        """Write the weight to `out`, which has its shape, in dequantize_triton.py."""
        from distlora_kernels.formats import dequantize_triton

        dequantize_triton.dequantize(self, parts, out, ends)

    def decode_into(self, weight: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Return the weight, filled by `decode`: the definition of the format in torch, on any device."""
        shape = weight.shape
        target, step, blocks = weight.view(-1), PIECE, PIECE // self.block
        if self.tile is not None:
            target, step, blocks = weight.view(-1, shape[-1]), self.tile[0], self.tiles(shape)[1]

        def decode(number: int) -> None:
            piece = target[number * step : (number + 1) * step]
            count = blocks if self.tile is not None else -(-len(piece) // self.block)
            values = self.decode(*self._blocks(parts, slice(number * blocks, number * blocks + count)))
            if self.tile is not None:
                values = self.in_rows(values, piece.shape)[:, : shape[-1]]
            piece.copy_(values.reshape(-1)[: piece.numel()].view(piece.shape))

        in_threads(decode, range(-(-len(target) // step)))
        return weight

    def dequantize_rows(
        self, parts: Sequence[Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return some rows of a weight (O, I) in a flat format in `dtype`: rows (n,) int64 -> (n, I)."""
        assert self.tile is None, f"{self.name} has no embeddings"
        columns, last = shape[1], self.num_groups(shape) * self.blocks_per_group - 1
        chosen = torch.empty(len(rows), columns, dtype=dtype, device=parts[0].device)
        # A row that does not begin with a block may touch one more.
        touched = columns // self.block if columns % self.block == 0 else (columns - 2) // self.block + 2
        blocks, weights = (torch.arange(count, device=rows.device) for count in (touched, columns))
        in_triton = uses_triton(parts[0])
        step = max((GPU_PIECE if in_triton else PIECE) // columns, 1)

        def decode(number: int) -> None:
            start = rows[number * step : (number + 1) * step, None] * columns
            index = (start // self.block + blocks).clamp_(max=last)
            values = self.decode(*self._blocks(parts, index.view(-1))).view(len(start), -1)
            if values.shape[1] > columns:
                values = values.gather(1, start % self.block + weights)
            chosen[number * step : (number + 1) * step] = values

        pieces = range(-(-len(rows) // step))
        if not in_triton:
            in_threads(decode, pieces)
            return chosen
        for number in pieces:  # On this thread's stream.
            decode(number)
        return chosen

    def _blocks(self, parts: Sequence[Tensor], index: slice | Tensor) -> list[Tensor]:
        """Return what the parts have for some blocks. A group's only number is that of all its blocks."""
        per_group, chosen = self.blocks_per_group, []
        for part in parts:
            if part.dim() > 1:
                chosen.append(part.reshape(len(part) * per_group, -1)[index])
            else:
                blocks = torch.arange(index.start, index.stop) if isinstance(index, slice) else index
                chosen.append(part[blocks // per_group, None])
        return chosen


def quantize(blocks: Tensor, largest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes (n, block) uint8, the bytes of `dtype`, and scales (n,) fp32 of blocks (n, block).

    scale = absmax / `largest`, at least 2^-126: below, a quotient could exceed it. Raises ValueError for NaN or Inf.
    """
    blocks, step = blocks.detach(), max(PIECE // blocks.shape[1], 1)
    codes = torch.empty(blocks.shape, dtype=dtype, device=blocks.device)
    scales = torch.empty(len(blocks), device=blocks.device)

    def quantize_piece(number: int) -> None:
        piece = slice(number * step, (number + 1) * step)
        values = blocks[piece].float()
        absmax = values.abs().amax(dim=1)
        if not bool(torch.isfinite(absmax).all()):
            raise ValueError("a weight holds NaN or Inf, which cannot be quantized")
        scales[piece] = absmax.div_(largest).clamp_(min=torch.finfo(torch.float32).tiny)
        values = values / scales[piece, None]
        codes[piece] = values if dtype.is_floating_point else values.round_()

    in_threads(quantize_piece, range(-(-len(blocks) // step)))
    return codes.view(torch.uint8), scales


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Numbers of 1 sign, 2 exponent and 1 mantissa bit (OCP Microscaling Formats 1.0, table 1)."""


@functools.cache
def e4m3(device: torch.device) -> Tensor:
    """Return (256,) fp32: every float8_e4m3fn; torch's own conversion takes 5 times as long."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@functools.cache
def half_e8m0(device: torch.device) -> Tensor:
    """Return (256,) fp32: 2^(code - 128), half of each ue8m0 number, as the last one is beyond fp32."""
    return torch.tensor([2.0 ** (code - 128) for code in range(256)], device=device)


@functools.cache
def _pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return (256,) complex64: the two numbers of every byte as one element, as torch looks up single elements."""
    pairs = [(levels[byte & 15], levels[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, device=device).view(torch.complex64).view(256)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return the entries of a table (256,) in the shape of `index` uint8; table[index] takes 10 times as long."""
    return torch.index_select(table, 0, index.reshape(-1).int()).view(index.shape)


def nibbles(codes: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the numbers of 4-bit codes, (n, bytes) uint8 -> (n, 2 bytes) fp32; the low nibble is the first."""
    return look_up(_pairs(levels, codes.device), codes).view(torch.float32)
