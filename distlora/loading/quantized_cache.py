"""Quantized-weights cache: a start reads its groups from the cache instead of quantizing them again.

The unit is a decoder layer. All ranks agree twice, for all layers at once: before reading, whether every rank finds all
its groups of a layer in some piece, and afterwards whether every rank read them undamaged. The other layers are
quantized from the source by all ranks, and each rank then writes its groups that no piece holds. The result is bit for
bit the same with and without the cache, on any number of ranks. No fault of the cache ends a run.

Groups are read by pread (mapped pages count against a job's memory limit), directly into the shard if that is host
memory, and checked there against one checksum per group.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import Segment
from distlora.loading.base_fingerprint import alike, content_of, gathered
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Backend, watch
from distlora.parallel.integrity import checksums
from distlora.system import atomic_io
from distlora.weights import quantized_cache_folder
from distlora.weights.conversion import Source
from distlora.weights.quantized_cache_folder import (
    FORMAT,
    GROUP_BYTES,
    PARTS,
    DamagedPieceError,
    Entry,
    Extent,
    Piece,
    PieceName,
    header_of,
    holes,
    read_piece,
)
from distlora_kernels.formats import nf4

QUANTIZATION = {
    "format": FORMAT,
    "kernels": 1,
    "type": "nf4",
    "double": True,
    "block": nf4.BLOCK,
    "blocks_per_group": nf4.BLOCKS_PER_GROUP,
}
"""Description of the quantization, part of the cache key. Increase `kernels` after any change of the bits that
`quantize_into` writes.
"""
CHUNK_GROUPS = 128
"""Groups read, checked or written at once: 1 MiB of codes, which fits into a core's cache."""
FREE_SHARE, FREE_BYTES = 0.05, 50 * 10**9
"""Free space that the cache leaves on a disk: the smaller of this fraction and these bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedCacheSettings:
    """Location of a run's quantized-weights cache, and the identity of its weights."""

    folder: Path
    limit: int | None
    """Maximum bytes of all entries; None for no limit."""
    base: str
    """Name of the base for people."""
    identity: str
    """`initial_adapter_file.base_identity`."""
    made_on: str
    """Device that quantizes, and the library that computes s B0 A0 (PiSSA)."""
    say: Callable[[str], None]
    """Function that prints a line on every rank."""


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


Plan = Mapping[str, Sequence[Piece]]
"""Pieces that may hold groups of this rank, by the weight's Hugging Face name."""


def own_groups(weight: Weight, backend: Backend) -> range:
    """Return the groups that this rank owns."""
    (codes, *_), first = backend.local_groups(weight.module)
    return range(first, max(first, min(first + len(codes), weight.module.num_groups)))


def lacking_groups(unit: Unit, plan: Plan, backend: Backend, *, one: bool = True) -> dict[str, list[range]]:
    """Return the groups of this rank that no piece of `plan` holds, by weight; empty if it finds all.

    `one`: a rank that owns no group needs one, which has the weight's offset.
    """
    lacking = {}
    for weight in unit.weights:
        groups = own_groups(weight, backend) or range(int(one))
        extents = [piece.extents[weight.name] for piece in plan[weight.name]]
        lacking[weight.name] = holes(groups, [(extent.first, extent.stop) for extent in extents])
    return {name: ranges for name, ranges in lacking.items() if ranges}


def group_checksums(codes: Tensor, scales: Tensor, group_scale: Tensor, first: int) -> Tensor:
    """Return checksums (g,) int64 of groups `first` onwards of a weight, on their device.

    `codes` (g, 8192) and `scales` (g, 256) are uint8, `group_scale` (g,) is fp32. The group's number is included, so
    that another group's bytes, or lost bytes read as zeros, give another checksum.
    """
    numbers = torch.arange(first + 1, first + 1 + len(codes), device=codes.device)  # Not 0, as zeros' checksums are.
    parts = [checksums(codes), checksums(scales), checksums(group_scale.view(-1, 1)), numbers]
    return checksums(torch.stack(parts, dim=1))


def cache_key(
    settings: QuantizedCacheSettings,
    headers: Mapping[str, Segment],
    contents: Mapping[Path, str],
    sources: Mapping[str, Source],
    weights: Sequence[Weight],
) -> str:
    """Return the name of an entry, 64 hex digits: equal if every byte of every quantized weight is equal.

    It covers the source's tensors (name, dtype, shape, position), the fingerprints of its files, the quantized weights
    and their sources, the quantization, and the identity of the base. The location of the files does not matter.
    """
    order = {file: index for index, file in enumerate(sorted(contents))}
    content = {
        "quantization": QUANTIZATION,
        "tensors": [[n, s.dtype, s.shape, order[s.file], s.offset, s.num_bytes] for n, s in sorted(headers.items())],
        "contents": [contents[file] for file in sorted(contents)],
        "weights": [
            [w.name, w.module.shape, list(sources[w.name].names)] for w in sorted(weights, key=lambda w: w.name)
        ],
        "base": settings.identity,
        "made_on": settings.made_on,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class QuantizedCache:
    """One load's reads and writes of the cache. A context manager: on exit everything is on the disk."""

    def __init__(self, units: Sequence[Unit], backend: Backend, say: Callable[[str], None]) -> None:
        """Make a cache that holds nothing until `open`; without `units` it stays empty."""
        self.units, self.bytes_read, self.bytes_written = units, 0, 0
        self._backend, self._say = backend, say
        self._filled: set[str] = set()
        self._waiting: dict[str, tuple[Unit, Plan]] = {}
        """Units to be quantized from their source, and the pieces that hold some of their groups, by path."""
        self._left = {unit.block: len(unit.weights) for unit in units}
        self._writer: QuantizedCacheWriter | None = None

    def __enter__(self) -> QuantizedCache:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._writer is not None:
            self.bytes_written = self._writer.close(abandon=error is not None)
            if self._writer.refused is not None:
                self._say(self._writer.refused)

    def open(
        self, entry: Entry, writer: QuantizedCacheWriter, make_room: Callable[[], bool], boundary: watch.Marker
    ) -> None:
        """Fill the shards of the layers that every rank finds complete and undamaged. Every rank must call it alike.

        `writer` takes the other layers once they are quantized, if every node's first rank can `make_room` for them.
        """
        entry.touch()
        pieces = entry.pieces_of_blocks()
        plans = [self._plan(unit, pieces.get(unit.block, []), entry.key) for unit in self.units]
        found = [not lacking_groups(unit, plans[index], self._backend) for index, unit in enumerate(self.units)]
        complete = [all(by_rank) for by_rank in zip(*gathered(found, self._backend), strict=True)]
        reports: list[tuple[bool, list[list[float]]]] = []
        """For each unit: True if all was read undamaged, and the offsets of each weight in its pieces."""
        for unit, plan, is_complete in zip(self.units, plans, complete, strict=True):
            report: tuple[bool, list[list[float]]] = (True, [])
            if is_complete:
                boundary(None, f"reading layer {unit.block} from the quantized-weights cache", long=True)
                failures, num_bytes = fill(unit, plan, self._backend)
                self.bytes_read += num_bytes
                for path, error in failures.items():
                    self._give_up(path, error)
                offsets = [sorted({p.extents[name].offset for p in holding}) for name, holding in plan.items()]
                report = (not failures, offsets)
            reports.append(report)
        again = []
        for index, by_rank in enumerate(zip(*gathered(reports, self._backend), strict=True)):
            unit, plan = self.units[index], plans[index]
            # One offset for each weight, unless two nodes quantized it to different bits.
            contradicting = any(offsets != by_rank[0][1] or any(len(o) > 1 for o in offsets) for _, offsets in by_rank)
            if complete[index] and not contradicting and all(undamaged for undamaged, _ in by_rank):
                self._filled |= {weight.path for weight in unit.weights}
                continue
            self._waiting |= {weight.path: (unit, plan) for weight in unit.weights}
            if complete[index]:
                again.append(str(unit.block))
            if contradicting:
                for path in {piece.path for holding in plan.values() for piece in holding}:
                    self._remove(path, "pieces of one weight have two offsets")
        if again and self._backend.writes:
            numbers = ", ".join(again)
            self._say(f"cached layers that are damaged, missing or unreadable on some rank, quantized again: {numbers}")
        if self._waiting:  # On every rank, or on none.
            self._writer = self._begin(entry, writer, make_room)

    def _begin(
        self, entry: Entry, writer: QuantizedCacheWriter, make_room: Callable[[], bool]
    ) -> QuantizedCacheWriter | None:
        """Return this rank's writer; None if it does not write. Every rank must call it alike."""
        has_room = True
        if self._backend.ranks.leads_machine:
            has_room = make_room()
            if has_room:
                with contextlib.suppress(OSError):  # It is reported with the first piece.
                    entry.begin(writer.described)
        if not all(gathered(has_room, self._backend)):
            return None
        shards = self._backend.shards
        if shards.num_replicas > 1:
            content = entry.content()
            self.bytes_read += len(content)
            # If all ranks see one entry, only the first replica's ranks write.
            if alike(content, self._backend) and shards.replica > 0:
                return None
        return writer

    def has(self, path: str) -> bool:
        """Return whether the weight of the module at `path` is in the shard already."""
        return path in self._filled

    def quantized(self, path: str) -> None:
        """Record that the weight of the module at `path` was quantized.

        After the last weight of a layer, the layer is written while the next one is quantized.
        """
        if path not in self._waiting:
            return
        unit, plan = self._waiting[path]
        self._left[unit.block] -= 1
        if self._left[unit.block] == 0 and self._writer is not None:
            self._writer.write(unit, plan)

    @property
    def filled_weights(self) -> int:
        """Weights of the whole model that came from the cache."""
        return sum(w.module.numel for unit in self.units for w in unit.weights if w.path in self._filled)

    def _plan(self, unit: Unit, names: Sequence[PieceName], key: str) -> Plan:
        """Return for each weight the pieces that may hold groups of this rank."""
        owned = {weight: own_groups(weight, self._backend) or range(1) for weight in unit.weights}
        totals = {weight.name: weight.module.num_groups for weight in unit.weights}
        pieces = []
        for name in names:
            if any(name.may_hold(weight.module.num_groups, groups) for weight, groups in owned.items()):
                try:
                    piece, num_bytes = read_piece(name.path, key)
                    self.bytes_read += num_bytes
                    if any(extent.stop > totals.get(weight, 0) for weight, extent in piece.extents.items()):
                        raise DamagedPieceError("it holds groups that the layer does not have")
                    pieces.append(piece)
                except (OSError, DamagedPieceError) as error:
                    self._give_up(name.path, error)
        return {name: [piece for piece in pieces if name in piece.extents] for name in totals}

    def _give_up(self, path: Path, error: OSError | DamagedPieceError) -> None:
        """Ignore a piece for this start. Only damaged pieces are removed: a disk or a server may recover."""
        if isinstance(error, DamagedPieceError):
            self._remove(path, str(error))
        elif not isinstance(error, FileNotFoundError | PermissionError):  # Removed meanwhile, or another user's.
            reason = error.strerror or error
            self._say(f"{path} of the quantized-weights cache cannot be read now ({reason}): quantizing this time")

    def _remove(self, path: Path, reason: str) -> None:
        self._say(f"{path} of the quantized-weights cache is damaged ({reason}): removed, quantizing again")
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._say(f"{path} cannot be removed ({error.strerror})")


def open_quantized_cache(
    settings: QuantizedCacheSettings | None,
    model: CausalLM,
    headers: Mapping[str, Segment],
    sources: Mapping[str, Source],
    backend: Backend,
    boundary: watch.Marker,
) -> QuantizedCache:
    """Find the base's entry and fill the shard from it. Every rank must call it alike."""
    units = _units_of(model) if settings is not None else []
    if settings is None or not units:
        return QuantizedCache([], backend, print)
    say = settings.say
    boundary(None, "looking up the base in the quantized-weights cache", long=True)
    is_usable = True
    try:
        atomic_io.private_folder(settings.folder)
    except OSError as error:
        is_usable = False
        say(
            f"quantized weights are not cached: {settings.folder} cannot be created ({error.strerror}); set "
            "quant.cache_dir"
        )
    if not all(gathered(is_usable, backend)):
        return QuantizedCache([], backend, say)
    files = sorted({segment.file for segment in headers.values()})
    content = content_of(files, settings.folder, backend, say, boundary)
    if content is None:
        if backend.writes:
            say("the ranks see different files of the base: its quantized weights are not cached")
        return QuantizedCache([], backend, say)
    digests, bytes_hashed = content
    weights = [weight for unit in units for weight in unit.weights]
    entry = Entry(settings.folder / cache_key(settings, headers, digests, sources, weights))
    groups = {weight.name: weight.module.num_groups for weight in weights}
    writer = QuantizedCacheWriter(entry, {"base": settings.base, "format": FORMAT, "weights": groups}, backend)
    cache = QuantizedCache(units, backend, say)
    cache.open(entry, writer, lambda: _make_room(settings, entry, sum(groups.values())), boundary)
    cache.bytes_read += bytes_hashed
    return cache


def _make_room(settings: QuantizedCacheSettings, entry: Entry, num_groups: int) -> bool:
    """Clean up the cache for the ranks of this node; return whether the whole entry fits within the limit."""
    own_bytes = max(entry.bytes_on_disk(), num_groups * GROUP_BYTES)
    try:
        quantized_cache_folder.remove_leftovers(settings.folder)
        removed, fits = quantized_cache_folder.make_room(settings.folder, entry, own_bytes, settings.limit)
    except OSError as error:
        settings.say(f"{settings.folder}: no room can be made in the quantized-weights cache ({error.strerror})")
        return False
    for figures in removed:
        settings.say(
            f"removed {figures.base} from the quantized-weights cache ({figures.num_bytes / 1e9:.2f} GB, least "
            "recently used): quant.cache_gb leaves no room for both"
        )
    if not fits:
        assert settings.limit is not None
        settings.say(
            f"{own_bytes / 1e9:.2f} GB of quantized weights are not cached: quant.cache_gb={settings.limit / 1e9:g} "
            "leaves no room beside entries in use or of other users"
        )
    return fits


def _units_of(model: CausalLM) -> list[Unit]:
    """Return the quantized weights of each decoder layer that has some."""
    paths = {module: path for path, module in model.named_modules()}
    units = []
    for number, block in enumerate(model.blocks):
        frozen = [
            Weight(model.hf_name(f"{paths[module]}.weight"), paths[module], module)
            for module in block.modules()
            if isinstance(module, FrozenTensor) and module.format is nf4.NF4
        ]
        if frozen:
            units.append(Unit(number, tuple(frozen)))
    return units


Rows = tuple[Tensor, Tensor, Tensor]
"""Codes, scales and group_scale of some groups."""


def _rows_of(weight: Weight, backend: Backend, first: int = 0, stop: int | None = None) -> Rows:
    """Return this rank's rows [first, stop) of a weight, or all."""
    codes, scales, group_scale = (part[first:stop] for part in backend.local_groups(weight.module)[0])
    return codes, scales, group_scale


class _Chunk(NamedTuple):
    """Groups [first, stop) of a weight from one piece, and the rows that they fill."""

    piece: Piece
    extent: Extent
    first: int
    stop: int
    rows: Rows


@torch.no_grad()
def fill(unit: Unit, plan: Plan, backend: Backend) -> tuple[dict[Path, OSError | DamagedPieceError], int]:
    """Fill this rank's groups of every weight, and the weights' offsets, from the pieces of `plan`.

    Returns (the pieces that are unreadable or damaged, the bytes read). The part of the shard that such a piece was to
    fill is undefined.
    """
    failed: dict[Path, OSError | DamagedPieceError] = {}
    files: dict[Path, BinaryIO] = {}
    differ: list[tuple[str, _Chunk, Tensor]] = []
    num_bytes = 0
    with contextlib.ExitStack() as stack:
        ahead = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead"))
        for weight in unit.weights:
            weight.module.get_buffer("offset").fill_(plan[weight.name][-1].extents[weight.name].offset)
            chunks = list(_chunks(weight, plan[weight.name], backend))
            reads = [ahead.submit(_read, chunk, files, stack) for chunk in chunks]
            for chunk, read in zip(chunks, reads, strict=True):
                try:
                    expected = read.result()
                except (OSError, DamagedPieceError) as error:
                    failed.setdefault(chunk.piece.path, error)
                    continue
                num_bytes += (chunk.stop - chunk.first) * GROUP_BYTES
                differs = (group_checksums(*chunk.rows, chunk.first) != expected.to(chunk.rows[0].device)).any()
                differ.append((weight.name, chunk, differs))
    for name, chunk, flag in differ:
        if bool(flag):
            reason = f"{name}: groups {chunk.first:,} to {chunk.stop - 1:,}"
            failed.setdefault(chunk.piece.path, DamagedPieceError(reason))
    return failed, num_bytes


def _read(chunk: _Chunk, files: dict[Path, BinaryIO], stack: contextlib.ExitStack) -> Tensor:
    """Fill the chunk's rows; return the stored checksums, (g,) int64 on the host. Opened files are kept in `files`."""
    path, skipped = chunk.piece.path, chunk.first - chunk.extent.first
    if path not in files:
        files[path] = stack.enter_context(path.open("rb", buffering=0))
    expected = torch.empty(chunk.stop - chunk.first, dtype=torch.int64)
    for part, tensor in zip(PARTS, (*chunk.rows, expected), strict=True):
        at = chunk.extent.parts[part].offset + skipped * PARTS[part][2]
        host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
        assert host.is_contiguous(), "a rank's rows lie one after the other"
        _pread(files[path].fileno(), _bytes_of(host), at)
        if host is not tensor:
            tensor.copy_(host)
    return expected


def _chunks(weight: Weight, pieces: Sequence[Piece], backend: Backend) -> Iterator[_Chunk]:
    """Yield this rank's groups, each once, from the pieces that together hold them."""
    owned = own_groups(weight, backend)
    at = owned.start
    while at < owned.stop:
        extents = [(piece.extents[weight.name], piece) for piece in pieces]
        covering = [(extent, piece) for extent, piece in extents if extent.first <= at < extent.stop]
        extent, piece = max(covering, key=lambda found: found[0].stop)
        end = min(extent.stop, owned.stop)
        for first in range(at, end, CHUNK_GROUPS):
            stop = min(first + CHUNK_GROUPS, end)
            rows = _rows_of(weight, backend, first - owned.start, stop - owned.start)
            yield _Chunk(piece, extent, first, stop, rows)
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
        self._entry, self.described, self._backend = entry, described, backend
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-cache")
        self._writes: list[Future[None]] = []
        self._bytes_written = 0
        self.refused: str | None = None
        """Reason why nothing more is written; None while writing works."""

    def write(self, unit: Unit, plan: Plan) -> None:
        """Write this rank's groups that no piece of `plan` holds. The shard must not change meanwhile."""
        self._writes.append(self._thread.submit(self._write, unit, plan))

    def close(self, *, abandon: bool) -> int:
        """Wait until all is on the disk and return the bytes written.

        `abandon`: wait only for the piece that is being written.
        """
        self._thread.shutdown(cancel_futures=abandon)
        for write in self._writes:
            if not write.cancelled():
                write.result()
        self._entry.touch()
        return self._bytes_written

    @torch.no_grad()
    def _write(self, unit: Unit, plan: Plan) -> None:
        if self.refused is not None:
            return
        try:
            paths = {piece.path for holding in plan.values() for piece in holding}
            present = {path for path in paths if path.exists()}  # Damaged ones were removed.
            plan = {name: [piece for piece in holding if piece.path in present] for name, holding in plan.items()}
            lacking = lacking_groups(unit, plan, self._backend, one=False)
            # One piece at a time, with at most one range per weight.
            for index in range(max(map(len, lacking.values()), default=0)):
                ranges = {name: of_weight[index] for name, of_weight in lacking.items() if index < len(of_weight)}
                self._entry.begin(self.described)
                disk = shutil.disk_usage(self._entry.path)
                kept_free = min(FREE_SHARE * disk.total, FREE_BYTES)
                if disk.free - sum(map(len, ranges.values())) * GROUP_BYTES < kept_free:
                    self.refused = (
                        f"quantized weights are not cached in {self._entry.path.parent}: the disk has "
                        f"{disk.free / 1e9:.2f} GB free, and the cache leaves {kept_free / 1e9:.2g} GB free"
                    )
                    break
                self._write_piece(unit, ranges)
        except OSError as error:
            self.refused = f"quantized weights cannot be cached in {self._entry.path.parent}: {error.strerror or error}"

    def _write_piece(self, unit: Unit, ranges: Mapping[str, range]) -> None:
        shards = self._backend.shards
        path = self._entry.path_of(unit.block, shards.index, shards.count, ranges)
        weights = {weight.name: weight for weight in unit.weights if weight.name in ranges}
        extents = {}
        for name, groups in ranges.items():
            offset = float(weights[name].module.get_buffer("offset"))
            extents[name] = Extent(groups.start, groups.stop, offset, {})

        def write(temporary: Path) -> None:
            with temporary.open("xb") as file:
                file.write(header_of(self._entry.key, extents))
                for name, groups in ranges.items():
                    skipped = groups.start - own_groups(weights[name], self._backend).start
                    _write_groups(file, _rows_of(weights[name], self._backend, skipped, skipped + len(groups)), groups)
                self._bytes_written += file.tell()

        atomic_io.replace_file(path, write)


def _write_groups(file: BinaryIO, rows: Rows, groups: range) -> None:
    """Write the parts of these groups one after another."""
    sums = torch.empty(len(groups), dtype=torch.int64)
    for at in range(0, len(groups), CHUNK_GROUPS):
        codes, scales, group_scale = (part[at : at + CHUNK_GROUPS] for part in rows)
        sums[at : at + len(codes)] = group_checksums(codes, scales, group_scale, groups.start + at)
        _write_bytes(file, codes)
    for part in (*rows[1:], sums):
        for some in part.split(64 * CHUNK_GROUPS):
            _write_bytes(file, some)


def _write_bytes(file: BinaryIO, tensor: Tensor) -> None:
    file.write(_bytes_of(tensor.cpu()))
