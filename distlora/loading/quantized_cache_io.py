"""Read groups from the pieces of the quantized-weights cache into a rank's shard, and write them.

Groups are read by pread (mapped pages count against a job's memory limit), one chunk ahead of the chunk whose checksums
are computed, directly into the shard if that is host memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Backend
from distlora.parallel.integrity import checksums
from distlora.system import atomic_io
from distlora.weights.quantized_cache_folder import Entry
from distlora.weights.quantized_cache_format import (
    GROUP_BYTES,
    PARTS,
    DamagedPieceError,
    Extent,
    Piece,
    PieceName,
    header_of,
    holes,
    read_piece,
)

CHUNK_GROUPS = 128
"""Groups read, checked or written at once: 1 MiB of codes, which fits into a core's cache."""
FREE_SHARE, FREE_BYTES = 0.05, 50 * 10**9
"""Free space that the cache leaves on a disk: the smaller of this fraction and these bytes."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A quantized weight."""

    name: str
    """Hugging Face name."""
    path: str
    """Module path in distlora's model."""
    module: FrozenTensor


@dataclass(frozen=True, slots=True)
class Unit:
    """The quantized weights of one decoder layer, which are read, quantized and written together."""

    block: int
    weights: tuple[Weight, ...]


def own_groups(weight: Weight, backend: Backend) -> range:
    """Return the groups that this rank owns."""
    rows, first = backend.local_rows(weight.module.codes)
    return range(first, max(first, min(first + len(rows), weight.module.num_groups)))


def wanted_groups(weight: Weight, backend: Backend) -> range:
    """Return the groups that this rank has to find: those it owns, or one for the weight's offset if it owns none."""
    return own_groups(weight, backend) or range(1)


def group_checksums(codes: Tensor, scales: Tensor, group_scale: Tensor, first: int) -> Tensor:
    """Return checksums (g,) int64 of groups `first` onwards of a weight, on their device.

    `codes` (g, 8192) and `scales` (g, 256) are uint8, `group_scale` (g,) is fp32. The group's number is included, so
    that another group's bytes, or lost bytes read as zeros, give another checksum.
    """
    numbers = torch.arange(first + 1, first + 1 + len(codes), device=codes.device)  # Not 0, as zeros' checksums are.
    parts = [checksums(codes), checksums(scales), checksums(group_scale.view(-1, 1)), numbers]
    return checksums(torch.stack(parts, dim=1))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A rank's rows of a weight, by part."""

    codes: Tensor
    scales: Tensor
    group_scale: Tensor

    @classmethod
    def of(cls, weight: Weight, backend: Backend) -> _Rows:
        module = weight.module
        return cls(*(backend.local_rows(part)[0] for part in (module.codes, module.scales, module.group_scale)))

    def slice(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes[start:stop], self.scales[start:stop], self.group_scale[start:stop]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Groups [first, stop) of a weight from one piece."""

    piece: Piece
    extent: Extent
    first: int
    stop: int


class QuantizedCacheReader:
    """Reads an entry's pieces and counts the bytes."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.bytes_read = 0

    def read_header(self, path: Path, unit: Unit) -> Piece:
        """Read the header of a piece of `unit`. Raises DamagedPieceError, and OSError if it cannot be read."""
        piece, num_bytes = read_piece(path, self._key)
        self.bytes_read += num_bytes
        groups = {weight.name: weight.module.num_groups for weight in unit.weights}
        for name, extent in piece.extents.items():
            if extent.stop > groups.get(name, 0):
                raise DamagedPieceError(f"it holds groups {extent.first:,} to {extent.stop - 1:,} of {name}")
        return piece

    @torch.no_grad()
    def fill(
        self, unit: Unit, plan: Mapping[str, Sequence[Piece]], backend: Backend
    ) -> dict[Path, OSError | DamagedPieceError]:
        """Fill this rank's groups of every weight, and the weights' offsets, from the pieces of `plan`.

        Returns the pieces that are unreadable or damaged; the part of the shard that they were to fill is then
        undefined.
        """
        failed: dict[Path, OSError | DamagedPieceError] = {}
        with contextlib.ExitStack() as stack:
            files: dict[Path, int] = {}
            pool = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead"))
            for weight in unit.weights:
                owned, pieces = own_groups(weight, backend), plan[weight.name]
                rows = _Rows.of(weight, backend)
                chunks = list(_chunks(weight.name, owned, pieces))
                for chunk in chunks:
                    path = chunk.piece.path
                    if path not in files and path not in failed:
                        try:
                            files[path] = os.open(path, os.O_RDONLY)
                            stack.callback(os.close, files[path])
                        except OSError as error:
                            failed[path] = error
                for piece in pieces:
                    assert isinstance(weight.module.offset, Tensor)
                    weight.module.offset.fill_(piece.extents[weight.name].offset)
                sound = [chunk for chunk in chunks if chunk.piece.path not in failed]
                failed |= self._fill(weight.name, sound, rows, owned.start, files, pool)
        return failed

    def _fill(
        self,
        name: str,
        chunks: Sequence[_Chunk],
        rows: _Rows,
        start: int,
        files: Mapping[Path, int],
        pool: ThreadPoolExecutor,
    ) -> dict[Path, OSError | DamagedPieceError]:
        failed: dict[Path, OSError | DamagedPieceError] = {}
        differ: list[tuple[_Chunk, Tensor]] = []
        pending: list[Future[Tensor]] = []
        for index, chunk in enumerate(chunks):
            for ahead in chunks[index + len(pending) : index + 2]:
                pending.append(
                    pool.submit(self._read, ahead, rows.slice(ahead.first - start, ahead.stop - start), files)
                )
            try:
                expected = pending.pop(0).result()
            except (OSError, DamagedPieceError) as error:
                failed[chunk.piece.path] = error
                continue
            parts = rows.slice(chunk.first - start, chunk.stop - start)
            differ.append((chunk, (group_checksums(*parts, chunk.first) != expected.to(parts[0].device)).any()))
        for chunk, flag in differ:
            if bool(flag):
                reason = f"{name}: groups {chunk.first:,} to {chunk.stop - 1:,}"
                failed.setdefault(chunk.piece.path, DamagedPieceError(reason))
        return failed

    def _read(self, chunk: _Chunk, rows: tuple[Tensor, Tensor, Tensor], files: Mapping[Path, int]) -> Tensor:
        """Fill `rows` with the chunk's groups; return their stored checksums, (g,) int64 on the host."""
        expected = torch.empty(chunk.stop - chunk.first, dtype=torch.int64)
        descriptor, skipped = files[chunk.piece.path], chunk.first - chunk.extent.first
        for part, tensor in zip(PARTS, (*rows, expected), strict=True):
            at = chunk.extent.parts[part].offset + skipped * PARTS[part][2]
            host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
            assert host.is_contiguous(), "a rank's rows lie one after the other"
            _pread(descriptor, _bytes_of(host), at)
            self.bytes_read += host.nbytes
            if host is not tensor:
                tensor.copy_(host)
        return expected


def _chunks(name: str, wanted: range, pieces: Sequence[Piece]) -> Iterator[_Chunk]:
    """Yield the groups of `wanted`, each once, from the pieces that together hold them."""
    at = wanted.start
    while at < wanted.stop:
        covering = [(piece, piece.extents[name]) for piece in pieces]
        piece, extent = max(
            ((piece, extent) for piece, extent in covering if extent.first <= at < extent.stop),
            key=lambda found: found[1].stop,
        )
        end = min(extent.stop, wanted.stop)
        for first in range(at, end, CHUNK_GROUPS):
            yield _Chunk(piece, extent, first, min(first + CHUNK_GROUPS, end))
        at = end


def _bytes_of(host: Tensor) -> memoryview:
    """Return the writable memory of a tensor."""
    return memoryview(host.flatten().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def _pread(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise DamagedPieceError(f"it ends at byte {offset:,}")
        view, offset = view[got:], offset + got


class QuantizedCacheWriter:
    """Writes a rank's groups of one unit after another in a thread."""

    def __init__(self, entry: Entry, described: Mapping[str, Any], backend: Backend) -> None:
        """Prepare to write; `described` is the content of entry.json."""
        self._entry, self._described, self._backend = entry, described, backend
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-cache")
        self._writes: list[Future[None]] = []
        self._kept_bytes = 0
        self._pieces: dict[int, list[PieceName]] | None = None
        """Pieces by decoder layer at the first write. Other ranks write other groups meanwhile, or the same bytes."""
        self.refused: str | None = None
        """Reason why nothing more is written; None while writing works."""

    def begin(self) -> None:
        """Create the entry for all ranks of a node. An error is reported with the first piece."""
        with contextlib.suppress(OSError):
            self._entry.begin(self._described)

    def write(self, unit: Unit) -> None:
        """Write this rank's groups that no piece holds. The shard must not change meanwhile."""
        self._writes.append(self._thread.submit(self._write, unit))

    def close(self, *, abandon: bool) -> int:
        """Wait until all is on the disk and return the bytes written.

        `abandon`: wait only for the piece that is being written.
        """
        self._thread.shutdown(cancel_futures=abandon)
        for write in self._writes:
            if not write.cancelled():
                write.result()
        self._entry.touch()
        return self._kept_bytes

    @torch.no_grad()
    def _write(self, unit: Unit) -> None:
        if self.refused is not None:
            return
        try:
            for ranges in self._lacking(unit):
                groups = sum(map(len, ranges.values()))
                if not self._has_space(groups * GROUP_BYTES):
                    break
                self._write_piece(unit, ranges)
        except OSError as error:
            self.refused = f"quantized weights cannot be cached in {self._entry.path.parent}: {error.strerror or error}"

    def _lacking(self, unit: Unit) -> Iterator[dict[str, range]]:
        """Yield this rank's groups that no piece holds, one piece at a time: at most one range per weight."""
        if self._pieces is None:
            self._pieces = self._entry.pieces_of_blocks()
        owned = {weight.name: own_groups(weight, self._backend) for weight in unit.weights}
        held: dict[str, list[tuple[int, int]]] = {weight.name: [] for weight in unit.weights}
        for name in self._pieces.get(unit.block, []):
            if any(name.may_hold(weight.module.num_groups, owned[weight.name]) for weight in unit.weights):
                with contextlib.suppress(OSError, DamagedPieceError):
                    for weight, extent in read_piece(name.path, self._entry.key)[0].extents.items():
                        if weight in held:
                            held[weight].append((extent.first, extent.stop))
        runs = {name: holes(groups, held[name]) for name, groups in owned.items()}
        for index in range(max(map(len, runs.values()))):
            yield {name: of_weight[index] for name, of_weight in runs.items() if index < len(of_weight)}

    def _has_space(self, num_bytes: int) -> bool:
        self._entry.begin(self._described)
        disk = shutil.disk_usage(self._entry.path)
        kept_free = min(FREE_SHARE * disk.total, FREE_BYTES)
        if disk.free - num_bytes >= kept_free:
            return True
        self.refused = (
            f"quantized weights are not cached in {self._entry.path.parent}: the disk has {disk.free / 1e9:.2f} GB "
            f"free, and the cache leaves {kept_free / 1e9:.2g} GB free"
        )
        return False

    def _write_piece(self, unit: Unit, ranges: Mapping[str, range]) -> None:
        shards = self._backend.shards
        path = self._entry.path_of(unit.block, shards.index, shards.count, ranges)
        weights = {weight.name: weight for weight in unit.weights if weight.name in ranges}
        extents = {}
        for name, groups in ranges.items():
            offset = weights[name].module.offset
            assert isinstance(offset, Tensor)
            extents[name] = Extent(groups.start, groups.stop, float(offset), {})

        def write(temporary: Path) -> None:
            with temporary.open("xb") as file:
                file.write(header_of(self._entry.key, extents))
                for name, groups in ranges.items():
                    rows = _Rows.of(weights[name], self._backend)
                    _write_groups(file, rows, groups, own_groups(weights[name], self._backend).start)
                self._kept_bytes += file.tell()

        atomic_io.replace_file(path, write)


def _write_groups(file: Any, rows: _Rows, groups: range, start: int) -> None:
    """Write the parts of these groups one after another; `rows` begin with group `start`."""
    low, high = groups.start - start, groups.stop - start
    sums = torch.empty(len(groups), dtype=torch.int64)
    for first in range(low, high, CHUNK_GROUPS):
        codes, scales, group_scale = rows.slice(first, min(first + CHUNK_GROUPS, high))
        at = first - low
        sums[at : at + len(codes)] = group_checksums(codes, scales, group_scale, groups.start + at)
        _write_bytes(file, codes)
    for part in (rows.scales[low:high], rows.group_scale[low:high], sums):
        for first in range(0, len(part), 64 * CHUNK_GROUPS):
            _write_bytes(file, part[first : first + 64 * CHUNK_GROUPS])


def _write_bytes(file: Any, tensor: Tensor) -> None:
    file.write(_bytes_of(tensor.cpu()))
