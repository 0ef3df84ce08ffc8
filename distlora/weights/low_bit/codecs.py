"""Decode weights that a checkpoint ships in low bits, a band of rows at a time.

A value is what the reference library computes before it rounds to a dtype: fp32, or bf16 where that is exact. Rounding
it once gives the library's value bit for bit. A codec reads the parts of whole rows of a stored matrix; the last band
is kept by the reader, because consecutive ranges of a weight often lie in the same one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distlora.architecture.low_bit_headers import LowBitTensor
from distlora.architecture.safetensors_headers import Segment

if TYPE_CHECKING:
    from distlora.weights.reader import Reader

BAND = 2**20
"""Weights that are decoded at once, about: 4 MiB in fp32."""


class Codec(ABC):
    """Decodes the weights of one layout. E matrices of (O, I) are stored; a tensor without experts has E = 1."""

    band = BAND
    """Weights of a band."""

    @abstractmethod
    def rows(self, tensor: LowBitTensor, reader: Reader, matrix: int, first: int, stop: int) -> Tensor:
        """Return rows [first, stop) of a stored matrix, (stop - first, I) fp32 or bf16."""

    def blocks(self, tensor: LowBitTensor, reader: Reader, first: int, count: int) -> tuple[Tensor, ...]:
        """Return the parts of `count` blocks of tensor.format from block `first` on, each (count, bytes or values).

        Blocks follow the flat order of `tensor.stored_shape`; FP8 tiles those of the (E * O, I) matrix.
        """
        raise AssertionError(f"{tensor.name} has no format")

    def bands(self, tensor: LowBitTensor, reader: Reader, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the flat weights [start, stop) of the logical layout in pieces."""
        *_, num_rows, width = tensor.shape
        step = num_rows  # A transposed matrix is decoded whole.
        if not tensor.transposed:
            step = min(max(self.band // width, 1), num_rows)
        while start < stop:
            row, matrix = start // width % num_rows, start // width // num_rows
            first = row // step * step
            band = self._band(tensor, reader, matrix, first, min(first + step, num_rows))
            before = (matrix * num_rows + first) * width
            end = min(stop, before + band.numel())
            yield band[start - before : end - before]
            start = end

    def _band(self, tensor: LowBitTensor, reader: Reader, matrix: int, first: int, stop: int) -> Tensor:
        key = (tensor, matrix, first)
        kept = reader.last_band
        if kept is not None and kept[0] == key:
            return kept[1]
        reader.last_band = None  # Two at once would double the memory.
        if tensor.transposed:
            band = self._transposed(tensor, reader, matrix).flatten()
        else:
            band = self.rows(tensor, reader, matrix, first, stop).flatten()
        reader.last_band = (key, band)
        return band

    def _transposed(self, tensor: LowBitTensor, reader: Reader, matrix: int) -> Tensor:
        """Return the transpose of a stored matrix, (I, O), decoded a few rows at a time."""
        num_rows, width = tensor.stored_shape[-2:]
        whole, step = None, max(self.band // width, 1)
        for first in range(0, num_rows, step):
            part = self.rows(tensor, reader, matrix, first, min(first + step, num_rows))
            if whole is None:
                whole = torch.empty(width, num_rows, dtype=part.dtype)
            whole[:, first : first + len(part)] = part.T
        assert whole is not None
        return whole


def read_part(reader: Reader, segment: Segment, start: int, stop: int) -> Tensor:
    """Return elements [start, stop) of a part; exponents (ue8m0, also as uint8) become fp32 powers of two."""
    values = reader.read([segment], start, stop)
    return values.float() if segment.dtype == "F8_E8M0" else values


class ScaledCodec(Codec):
    """FP8 (e4m3) or 8-bit integers, with a scale per block of rows and columns: code * scale in fp32.

    transformers' Fp8Dequantize; compressed-tensors' float-quantized and int-quantized; ModelOpt's FP8.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        """Multiplies the product, as bitsandbytes divides by 127."""

    def rows(self, tensor: LowBitTensor, reader: Reader, matrix: int, first: int, stop: int) -> Tensor:
        """Return rows of a stored matrix."""
        num_rows, width = tensor.shape[-2:]
        height, columns = tensor.block
        start = matrix * num_rows + first
        codes = reader.read([tensor.parts["codes"]], start * width, (start + stop - first) * width).view(-1, width)
        across = -(-width // columns)
        down = -(-num_rows // height)
        low, high = first // height, -(-stop // height)
        scales = self.scales(tensor, reader, (matrix * down + low) * across, (matrix * down + high) * across)
        per_row = torch.arange(first, stop).div(height, rounding_mode="floor") - low
        values = codes.float()
        grid = scales.view(-1, across)[per_row]
        whole = width // columns
        values[:, : whole * columns].unflatten(1, (whole, columns)).mul_(grid[:, :whole, None])
        values[:, whole * columns :].mul_(grid[:, whole:])
        return values if self.factor == 1 else values.mul_(self.factor)

    @staticmethod
    def scales(tensor: LowBitTensor, reader: Reader, start: int, stop: int) -> Tensor:
        """Return scales [start, stop) in fp32."""
        segment = tensor.parts["scales"]
        values = read_part(reader, segment, start, stop)
        return torch.ldexp(torch.ones(()), values.int() - 127) if segment.dtype == "U8" else values.float()


CODECS: dict[str, Codec] = {"scaled": ScaledCodec()}


def read_low_bit(tensor: LowBitTensor, reader: Reader, start: int, stop: int) -> Tensor:
    """Return the flat weights [start, stop) of a tensor in its logical layout, fp32 or bf16."""
    return torch.cat(list(CODECS[tensor.codec].bands(tensor, reader, start, stop)))
