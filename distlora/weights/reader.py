"""Read exact byte ranges of a parameter by pread, one chunk ahead of its use.

pread instead of mmap, because mapped pages count against a job's memory limit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from distlora.architecture.low_bit_headers import LowBitSegment, LowBitTensor
from distlora.architecture.safetensors_headers import DTYPE_BYTES, Segment, overlaps
from distlora.config import UserError
from distlora.weights.low_bit import CODECS

Value = TypeVar("Value")

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
COLUMNS_BYTES = 2**23
"""Bytes of a matrix that are read for a few of its columns."""
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Reader:
    """Reads flat element ranges of parameters. A parameter is a sequence of segments, concatenated in flat order."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self.bytes_read = 0
        self.last_band: tuple[tuple[LowBitTensor, int, int], Tensor] | None = None
        """The last decoded band of a weight in low bits: (weight, matrix, first row), values."""
        self.checked: set[Segment] = set()
        """Tensors beside a weight in low bits that its codec has found right."""
        self._columns: dict[tuple[Path, int], tuple[int, Tensor]] = {}
        """Kept columns of matrices by their place: (first column, columns)."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ahead.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)

    def chunks(self, segments: Sequence[Segment], start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first element, flat tensor in the source's dtype) for [start, stop), `size` elements at a time.

        The next chunk is read ahead.
        """
        return self.ahead(functools.partial(self.read, segments), start, stop, size)

    def ahead(self, read: Callable[[int, int], Value], start: int, stop: int, size: int) -> Iterator[tuple[int, Value]]:
        """Yield (first, read(first, end)) for each `size` of [start, stop), and read the next one meanwhile."""
        starts = range(start, stop, size)
        pending = None
        for position, first in enumerate(starts):
            current = pending or self._ahead.submit(read, first, min(first + size, stop))
            pending = None
            if position + 1 < len(starts):
                following = starts[position + 1]
                pending = self._ahead.submit(read, following, min(following + size, stop))
            yield first, current.result()

    def read(self, segments: Sequence[Segment], start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the concatenated segments; those of weights in low bits decoded."""
        if isinstance(segments[0], LowBitSegment):
            return self._decoded(segments, start, stop)
        element = DTYPE_BYTES[segments[0].dtype]
        buffer = bytearray((stop - start) * element)
        view, done = memoryview(buffer), 0
        for segment, low, high in overlaps(segments, start, stop):
            target = view[done : done + (high - low) * element]
            self._fill(target, segment.file, segment.offset + low * element)
            done += len(target)
        assert done == len(buffer), f"elements {start} to {stop} lie beyond those of the parameter"
        self.bytes_read += done
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[segments[0].dtype])

    def _decoded(self, segments: Sequence[Segment], start: int, stop: int) -> Tensor:
        pieces = list[Tensor]()
        for segment, low, high in overlaps(segments, start, stop):
            assert isinstance(segment, LowBitSegment), "conversion.py lets no parameter be of both"
            codec, offset = CODECS[segment.tensor.codec], segment.offset
            pieces += codec.bands(segment.tensor, self, offset + low, offset + high)
        return torch.cat(pieces) if pieces else torch.empty(0)

    def read_columns(self, segment: Segment, first: int, stop: int) -> Tensor:
        """Return columns [first, stop) of a stored matrix, (rows, stop - first).

        A row's columns are few bytes, so up to COLUMNS_BYTES are read ahead and kept, of three matrices at a time.
        """
        rows = segment.shape[0]  # Zero points of one word per row may be stored as a vector.
        width = segment.numel // rows
        key, element = (segment.file, segment.offset), DTYPE_BYTES[segment.dtype]
        low, kept = self._columns.get(key, (0, torch.empty(rows, 0)))
        if not low <= first <= stop <= low + kept.shape[1]:
            low = first
            size = min(max(COLUMNS_BYTES // (rows * element), stop - first), width - first)
            if key not in self._columns and len(self._columns) == 3:
                del self._columns[next(iter(self._columns))]
            buffer = bytearray(rows * size * element)
            view, step = memoryview(buffer), rows if size == width else 1  # Whole rows lie together.
            for row in range(0, rows, step):
                target = view[row * size * element : (row + step) * size * element]
                self._fill(target, segment.file, segment.offset + (row * width + low) * element)
            self.bytes_read += len(buffer)
            kept = torch.frombuffer(buffer, dtype=TORCH_DTYPES[segment.dtype]).view(rows, size)
            self._columns[key] = low, kept
        return kept[:, first - low : stop - low]

    def _fill(self, view: memoryview, file: Path, offset: int) -> None:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        while view:
            got = os.preadv(self._files[file], [view], offset)
            if got == 0:
                raise OSError(
                    f"{file} ended at byte {offset:,} while it was read, so it was changed after the run began; start "
                    "again once nobody writes it"
                )
            view, offset = view[got:], offset + got


def check_finite(name: str, *tensors: Tensor) -> None:
    """Raise UserError if a weight of the base, or a part of it, holds NaN or Inf."""
    if not all(map(all_finite, tensors)):
        raise UserError(f"{name} holds NaN or Inf weights; the checkpoint is damaged, download it again")


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds no NaN or Inf.

    A finite sum proves it, and takes a twentieth of the time of isfinite on a CPU. Otherwise the sum may have
    overflowed, so each element is checked.
    """
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
