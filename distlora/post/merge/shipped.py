"""Write a merged model in the low bits that its base is shipped in: only changed tensors are quantized again.

All other tensors, zero points and global scales keep their bytes. Changed tensors that the base stores in 16 or 32 bits
are written in that dtype.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from distlora.architecture.low_bit_headers import LowBitSegment, LowBitTensor
from distlora.architecture.safetensors_headers import Segment
from distlora.config import UserError
from distlora.post.merge.output_folder import Cursor
from distlora.post.merge.parameters import Parameter
from distlora.post.weights import Base
from distlora.weights.low_bit.codecs import MatrixRows
from distlora.weights.low_bit.requantize import requantize
from distlora.weights.reader import DTYPE_NAMES, TORCH_DTYPES, Reader
from distlora.weights.writer import Files, Tensors

BAND = 2**20
"""Weights that are quantized at once, about: 4 MiB in fp32. A block and a transposed matrix are never divided."""


class Outputs:
    """The tensors that are written of parameters: in one dtype, or (None) in that of the base, and its low bits."""

    def __init__(self, base: Base, dtype: torch.dtype | None) -> None:
        self._dtype, self._names = dtype, {segment: name for name, segment in base.files.stored.items()}

    def tensors(self, parameter: Parameter) -> Tensors:
        """Return the tensors to write. Raises UserError for a matrix in low bits that gets new rows."""
        low_bit = self._low_bit(parameter)
        if not low_bit:
            return {name: (DTYPE_NAMES[self._dense(parameter)], shape) for name, shape in parameter.outputs.items()}
        if list(parameter.outputs.values()) != [tensor.shape for tensor in low_bit]:
            raise UserError(f"--dtype=shipped: {parameter.weight.name} is in low bits and grows; leave --dtype out")
        parts = [tensor.parts[part] for tensor in low_bit for part in ("codes", "scales")]
        return {self._names[part]: (part.dtype, part.shape) for part in parts}

    def cursor(self, files: Files, parameter: Parameter, reader: Reader) -> Cursor | LowBitCursor:
        """Return what writes a parameter; `reader` reads shipped scales."""
        if low_bit := self._low_bit(parameter):
            return LowBitCursor(files, low_bit, self._names, reader)
        return Cursor(files, parameter.weight.name, parameter.outputs, self._dense(parameter))

    def _low_bit(self, parameter: Parameter) -> list[LowBitTensor]:
        segments = parameter.weight.source.segments if self._dtype is None else ()
        return [segment.tensor for segment in segments if isinstance(segment, LowBitSegment)]

    def _dense(self, parameter: Parameter) -> torch.dtype:
        return self._dtype or TORCH_DTYPES[parameter.weight.source.segments[0].dtype]


class LowBitCursor:
    """Quantizes the values of a parameter, in flat order, and writes its codes and scales."""

    def __init__(
        self, files: Files, tensors: Sequence[LowBitTensor], names: Mapping[Segment, str], reader: Reader
    ) -> None:
        self.lost = 0.0
        """||M - Q||^2 of what is written."""
        self._files, self._names = files, names
        self._bands = deque(band for tensor in tensors for band in _bands(tensor, reader))
        self._values = list[Tensor]()
        """Flat values of the next bands."""

    def write(self, values: Tensor) -> int:
        """Quantize and write values; return the bytes written."""
        self._values.append(values.reshape(-1))
        written = 0
        while self._bands:
            at = self._bands[0]
            numel = at.num_rows * at.tensor.stored_shape[-1]
            if sum(map(len, self._values)) < numel:
                break
            flat = torch.cat(self._values)
            rows, self._values = flat[:numel].view(-1, at.tensor.shape[-1]), [flat[numel:]]
            parts, lost = requantize(at, rows.T.contiguous() if at.tensor.transposed else rows)
            for part, stored in parts.items():
                self._files.write(self._names[at.tensor.parts[part]], at.span(part)[0], stored)
                written += stored.nbytes
            self.lost += lost
            self._bands.popleft()
        return written

    def close(self) -> None:
        """Check that every tensor is written whole."""
        assert not self._bands, "a parameter ended early"


def _bands(tensor: LowBitTensor, reader: Reader) -> Iterator[MatrixRows]:
    """Yield stored rows in flat order: rows of whole blocks; transposed matrices whole."""
    rows, width = tensor.stored_shape[-2:]
    height = tensor.block[0]
    step = rows if tensor.transposed else max(BAND // width // height, 1) * height
    for matrix in range(tensor.shape[0] if len(tensor.shape) == 3 else 1):
        for first in range(0, rows, step):
            yield MatrixRows(tensor, reader, matrix, first, min(first + step, rows))
