"""Read the parameters of a GGUF file: rows in the model's order, as blocks of ggml or decoded."""

from __future__ import annotations

import bisect
import itertools
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distlora.architecture.gguf_note import GgufTensor, format_name
from distlora.architecture.low_bit_headers import LowBitTensor
from distlora.architecture.safetensors_headers import Segment
from distlora.weights.low_bit.codecs import Codec, MatrixRows
from distlora_kernels.formats import FORMATS
from distlora_kernels.reference import GROUP

if TYPE_CHECKING:
    from distlora.weights.reader import Reader

DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufCodec(Codec):
    """ggml's blocks, row by row, in fp32: the values of gguf.quants.dequantize."""

    def rows(self, at: MatrixRows) -> Tensor:
        """Return rows of a stored matrix."""
        before = at.matrix * at.tensor.shape[-2] if at.matrix else 0
        return self._decoded(at.tensor, at.reader, before + at.first, before + at.stop).view(at.num_rows, -1)

    def blocks(self, tensor: LowBitTensor, reader: Reader, first: int, count: int) -> tuple[Tensor, ...]:
        """Return the bytes of blocks."""
        assert isinstance(tensor, GgufTensor)
        _, weights, num_bytes = tensor.types[0]
        per_row = tensor.width // weights
        row, stop = first // per_row, -(-(first + count) // per_row)
        ((_, content),) = _stored_rows(tensor, reader, row, stop)
        return (content.view(-1, num_bytes)[first - row * per_row :][:count],)

    def _decoded(self, tensor: LowBitTensor, reader: Reader, first: int, stop: int) -> Tensor:
        assert isinstance(tensor, GgufTensor)
        values = torch.cat([decode(kind, content) for kind, content in _stored_rows(tensor, reader, first, stop)])
        return values.sub_(1) if tensor.minus_one else values


def _stored_rows(tensor: GgufTensor, reader: Reader, first: int, stop: int) -> list[tuple[str, Tensor]]:
    """Return the bytes of the parameter's rows [first, stop), by (type, bytes) of neighbours of one type."""
    pieces = list[tuple[str, Segment]]()
    for run in range(bisect.bisect_right(tensor.runs, (first, sys.maxsize)) - 1, len(tensor.runs)):
        row, start, count = tensor.runs[run]
        if row >= stop:
            break
        low, high = start + max(first - row, 0), start + min(stop - row, count)
        for (kind, weights, block_bytes), part in zip(tensor.types, tensor.parts.values(), strict=True):
            row_bytes = tensor.width // weights * block_bytes
            begin, end = max(low, 0), min(high, part.num_bytes // row_bytes)
            if begin < end:
                size = (end - begin) * row_bytes
                pieces.append((kind, Segment(part.file, part.offset + begin * row_bytes, size, "U8", (size,))))
            low, high = (each - part.num_bytes // row_bytes for each in (low, high))
    found = []
    for kind, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        segments = [segment for _, segment in group]
        found.append((kind, reader.read(segments, 0, sum(segment.num_bytes for segment in segments))))
    return found


def decode(kind: str, content: Tensor) -> Tensor:
    """Return the flat weights of bytes of whole blocks, in fp32."""
    if kind in DENSE:
        return content.view(DENSE[kind]).float()
    format = FORMATS.get(format_name(kind))
    if format is not None:
        (part,), length = format.parts, len(content)
        groups = content.new_zeros(-(-length // part.nbytes), part.nbytes)
        groups.view(-1)[:length] = content
        shape = (length * GROUP // part.nbytes,)
        return format.dequantize((groups,), shape=shape, dtype=torch.float32)
    import gguf  # The types that no format of the kernels holds.

    return torch.from_numpy(gguf.quants.dequantize(content.numpy(), gguf.GGMLQuantizationType[kind]).copy())
