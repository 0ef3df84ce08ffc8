"""Write and read safetensors files one tensor at a time, sharded or not, in folders that appear complete or not at all.

Rank 0 writes a file front to back, piece by piece as the tensors are streamed to it, and each rank reads only its rows.
No rank ever holds a whole model. The bytes do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME, Segment, header_bytes, lay_out
from distlora.config import UserError
from distlora.parallel import Backend
from distlora.parallel.ranks import HostRows
from distlora.run_folder.layout import replaced_folder, temporary_folder
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


Files = Mapping[str, Mapping[str, Tensor | HostRows | DeferredTensor] | dict[str, Any]]
"""Tensors (*.safetensors) or JSON (*.json) by file name."""


@contextlib.contextmanager
def atomic_folder(folder: Path, backend: Backend) -> Iterator[Path]:
    """Yield a temporary folder that then appears as `folder`, complete or not at all.

    An older folder of the same name is set aside first, then removed. Ranks that do not write get a path that does not
    exist. If the folder cannot be made, the OSError is raised after the block, because other ranks may wait for this
    one inside of it.
    """
    temporary = temporary_folder(folder)
    if not backend.writes:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    refused: OSError | None = None
    try:
        # Never RUN itself: if that is missing too, its disk may be unmounted.
        if not folder.parent.exists():
            folder.parent.mkdir(exist_ok=True)
            atomic_io.sync(folder.parent.parent)
        temporary.mkdir()
    except OSError as error:
        refused = error
    try:
        yield temporary
        if refused is None:
            publish(temporary, folder)
    except OSError:
        if refused is None:
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # Half a checkpoint may be what fills the disk.
    if refused is not None:
        raise refused


@contextlib.contextmanager
def new_folder(folder: Path, *, inside: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that then appears as the new `folder`, for a process without ranks.

    `inside`: yield a path that does not exist yet, where the block makes a folder or a file. The path is locked by this
    process; leftovers of a killed process are removed. Raises UserError if another process is writing it, and if
    `folder` exists by then, which stays unchanged.
    """
    temporary = temporary_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        _own(descriptor, temporary, folder)
        made = temporary / folder.name if inside else temporary
        try:
            yield made
            _sync(made)
            if folder.exists():
                raise UserError(f"{folder} was created meanwhile; name another place with --out")
            made.rename(folder)
            atomic_io.sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(descriptor)


def _own(descriptor: int, temporary: Path, folder: Path) -> None:
    """Lock an open folder for this process, and empty it."""
    with contextlib.suppress(OSError):  # Some network file systems have no locks.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {folder}; wait for it, or name another place with --out"
            ) from None
    # The other process may have renamed or removed it between the two calls.
    if not temporary.exists() or not os.path.samestat(temporary.stat(), os.fstat(descriptor)):
        raise UserError(f"another process has just written {folder}; name another place with --out")
    for left in temporary.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name, after syncing it to the disk."""
    _sync(temporary)
    replaced = replaced_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        temporary.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    atomic_io.sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        atomic_io.sync(path)
    atomic_io.sync(folder)


def write_files(
    folder: Path, files: Files, backend: Backend, *, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write tensors to safetensors with `metadata` in their headers, and other content to JSON. On every rank.

    Returns the SHA-256 of the files on the writing rank, nothing on the others. `publish` syncs them. An OSError is
    raised after every tensor was streamed, so that no other rank is left waiting.
    """
    sums: dict[str, str] = {}
    failed: OSError | None = None
    for name, content in files.items():
        try:
            if name.endswith(".safetensors"):
                if (digest := write_tensors(folder / name, content, backend, metadata=metadata)) is not None:
                    sums[name] = digest
            elif backend.writes:
                atomic_io.write_json(folder / name, content)
                sums[name] = atomic_io.sha256(folder / name)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return sums
