"""Write and read safetensors files one tensor at a time, whether the tensors are sharded or not.

Rank 0 writes a file front to back, piece by piece as the tensors are streamed to it, and each rank reads only its rows.
No rank ever holds a whole model. The bytes do not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME, Segment, header_bytes, lay_out
from distlora.parallel import Backend
from distlora.parallel.ranks import HostRows
from distlora.system import atomic_io
from distlora.weights.reader import DTYPE_NAMES, Reader

SHARD_BYTES = 5 * 10**9
"""Maximum bytes of tensors in one file of a model's folder; a larger tensor has its own file."""
READ_ELEMENTS = 2**22
"""Elements read at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeferredTensor:
    """A tensor, the same on every rank, that only the writing rank makes, when it is about to be written."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | HostRows | DeferredTensor],
    backend: Backend,
    dtype: torch.dtype | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> str | None:
    """Write one safetensors file, with all parameters cast to `dtype` if it is given. Every rank must call it alike.

    Returns the SHA-256 of its bytes in hexadecimal on the writing rank. An OSError there is raised after every tensor
    was streamed.
    """
    kinds = {
        name: (dtype if isinstance(tensor, nn.Parameter) else None) or tensor.dtype for name, tensor in tensors.items()
    }
    table = lay_out({name: (DTYPE_NAMES[kinds[name]], tensor.shape) for name, tensor in tensors.items()})
    file = _HashedFile(path) if backend.writes else None
    if file is not None:
        file.write(header_bytes(table, {"format": "pt", **(metadata or {})}))
    write = file.write_piece if file is not None else lambda piece: None
    for name in table:
        tensor = tensors[name]
        if isinstance(tensor, DeferredTensor):
            if file is None:
                continue
            try:
                tensor = tensor.make()
            except OSError as error:  # The others stream the next tensors all the same.
                file.error = file.error or error
                continue
        backend.stream(tensor, write, kinds[name])
    return file.close() if file is not None else None


class _HashedFile:
    """A file that is hashed while it is written, so that a checkpoint of hundreds of GB is not read again.

    An OSError is kept until `close`, and nothing is written after it: other ranks stream their rows to this one, and
    would wait for ever if it stopped half-way.
    """

    def __init__(self, path: Path) -> None:
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.error: OSError | None = None
        try:
            self._file = path.open("wb")
        except OSError as error:
            self.error = error

    def write(self, content: bytes | memoryview) -> None:
        if self.error is not None:
            return
        assert self._file is not None
        try:
            self._file.write(content)
        except OSError as error:
            self.error = error
        self._digest.update(content)

    def write_piece(self, piece: Tensor) -> None:
        """Write a flat tensor in host memory."""
        self.write(piece.view(torch.uint8).numpy().data)

    def close(self) -> str:
        """Return the SHA-256 of what was written, in hexadecimal. Raises the first OSError."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:  # Of what was buffered.
                self.error = self.error or error
        if self.error is not None:
            raise self.error
        return self._digest.hexdigest()


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    backend: Backend,
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors as transformers does: one file, or several and an index. Every rank must call it.

    Parameters are cast to `dtype`, buffers keep theirs.
    """
    shards: list[dict[str, Tensor]] = []
    filled = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    stem, suffix = SINGLE_NAME.split(".")
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE_NAME]
    failed: OSError | None = None
    for file, shard in zip(files, shards, strict=True):
        try:
            write_tensors(folder / file, shard, backend, dtype)
        except OSError as error:  # The other ranks stream the next files all the same.
            failed = failed or error
    if failed is not None:
        raise failed
    if backend.writes and len(shards) > 1:
        total = sum(tensor.numel() for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in sorted(shard)}
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        atomic_io.write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def read_into(tensor: Tensor, segment: Segment, reader: Reader, backend: Backend) -> None:
    """Fill a tensor, or this rank's rows of it, from a segment of the same shape, cast to its dtype."""
    read_rows(*backend.local_rows(tensor), segment, reader)


@torch.no_grad()
def read_rows(local: Tensor, first_row: int, segment: Segment, reader: Reader) -> None:
    """Fill plain memory with the segment's rows from `first_row` on, cast to its dtype."""
    flat = local.view(-1)
    start = first_row * math.prod(local.shape[1:])
    for first, chunk in reader.chunks([segment], start, start + flat.numel(), READ_ELEMENTS):
        flat[first - start : first - start + chunk.numel()] = chunk
