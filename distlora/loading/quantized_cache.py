"""Quantized-weights cache: a start reads its groups from the cache instead of quantizing them again.

The unit is a decoder layer. All ranks agree twice, for all layers at once: before reading, whether every rank finds all
its groups of a layer in some piece, and afterwards whether every rank read them undamaged. Only such layers are taken
from the cache. The others are quantized from the source by all ranks, and each rank then writes its groups that no
piece holds. The result is bit for bit the same with and without the cache, on any number of ranks.

Groups are read into the shard and checked there, against one checksum per group. No fault of the cache ends a run:
damaged pieces are reported, removed and quantized again, and a full disk is reported once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import Segment
from distlora.loading.base_fingerprint import alike, content_of, number_of
from distlora.loading.quantized_cache_io import QuantizedCacheReader, QuantizedCacheWriter, Unit, Weight, wanted_groups
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Backend, watch
from distlora.weights import quantized_cache_folder as quantized_cache_folder
from distlora.weights.conversion import Source
from distlora.weights.quantized_cache_folder import Entry
from distlora.weights.quantized_cache_format import FORMAT, GROUP_BYTES, DamagedPieceError, Piece, PieceName, holes
from distlora_kernels import nf4

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
        self.units, self.bytes_read, self.kept_bytes = units, 0, 0
        self._backend, self._say = backend, say
        self._filled: set[str] = set()
        self._waiting: dict[str, Unit] = {}
        """Units to be quantized from their source, by path, until their last weight is."""
        self._left = {unit.block: len(unit.weights) for unit in units}
        self._writer: QuantizedCacheWriter | None = None

    def __enter__(self) -> QuantizedCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self.kept_bytes = self._writer.close(abandon=error is not None)
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
        reader = QuantizedCacheReader(entry.key)
        plans = [self._plan(unit, pieces.get(unit.block, []), reader) for unit in self.units]
        lacking = self._agreed([int(plan is None) for plan in plans])
        offsets = torch.zeros(len(self.units), dtype=torch.int64)
        damaged = [0] * len(self.units)
        for index, (unit, plan) in enumerate(zip(self.units, plans, strict=True)):
            if lacking[index]:
                continue
            boundary(None, f"reading layer {unit.block} from the quantized-weights cache", long=True)
            assert plan is not None
            failures = reader.fill(unit, plan, self._backend)
            weight_offsets = _offsets_of(plan, unit)
            offsets[index] = number_of(json.dumps(weight_offsets))
            if any(len(each) > 1 for each in weight_offsets):
                damaged[index] = _OFFSETS_DIFFER
            for path, error in failures.items():
                damaged[index] = max(damaged[index], _DAMAGED)
                self._give_up(path, error)
        self.bytes_read += reader.bytes_read
        unsound = self._agreed_on_soundness(damaged, offsets)
        for index, (unit, plan) in enumerate(zip(self.units, plans, strict=True)):
            if not lacking[index] and not unsound[index]:
                self._filled |= {weight.path for weight in unit.weights}
                continue
            self._waiting |= {weight.path: unit for weight in unit.weights}
            if unsound[index] == _OFFSETS_DIFFER:
                assert plan is not None
                for path in {piece.path for pieces in plan.values() for piece in pieces}:
                    self._remove(path, "pieces of one weight have two offsets")
        again = [str(unit.block) for unit, flag in zip(self.units, unsound, strict=True) if flag]
        if again and self._backend.writes:
            numbers = ", ".join(again)
            self._say(f"cached layers that are damaged, missing or unreadable on some rank, quantized again: {numbers}")
        if self._waiting:  # On every rank, or on none.
            self._writer = self._begin(entry, writer, make_room)

    def _begin(
        self, entry: Entry, writer: QuantizedCacheWriter, make_room: Callable[[], bool]
    ) -> QuantizedCacheWriter | None:
        """Return this rank's writer; None if it does not write. Every rank must call it alike."""
        no_room = False
        if self._backend.ranks.leads_machine:
            no_room = not make_room()
            if not no_room:
                writer.begin()
        (no_room_for_some,) = self._agreed([int(no_room)])
        shards = self._backend.shards
        others_write = shards.copies > 1 and self._is_shared(entry) and shards.copy > 0
        return None if no_room_for_some or others_write else writer

    def has(self, path: str) -> bool:
        """Return whether the weight of the module at `path` is in the shard already."""
        return path in self._filled

    def quantized(self, path: str) -> None:
        """Record that the weight of the module at `path` was quantized.

        After the last weight of a layer, the layer is written while the next one is quantized.
        """
        unit = self._waiting.get(path)
        if unit is None:
            return
        self._left[unit.block] -= 1
        if self._left[unit.block] == 0 and self._writer is not None:
            self._writer.write(unit)

    @property
    def filled_weights(self) -> int:
        """Weights of the whole model that came from the cache."""
        return sum(w.module.numel for unit in self.units for w in unit.weights if w.path in self._filled)

    def _plan(
        self, unit: Unit, names: Sequence[PieceName], reader: QuantizedCacheReader
    ) -> dict[str, list[Piece]] | None:
        """Return for each weight the pieces that together hold this rank's groups; None if some groups are missing."""
        pieces = []
        for name in names:
            if any(
                name.may_hold(weight.module.num_groups, wanted_groups(weight, self._backend)) for weight in unit.weights
            ):
                try:
                    pieces.append(reader.read_header(name.path, unit))
                except (OSError, DamagedPieceError) as error:
                    self._give_up(name.path, error)
        plan = {}
        for weight in unit.weights:
            holding = [piece for piece in pieces if weight.name in piece.extents]
            held = [(piece.extents[weight.name].first, piece.extents[weight.name].stop) for piece in holding]
            if holes(wanted_groups(weight, self._backend), held):
                return None
            plan[weight.name] = holding
        return plan

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

    def _is_shared(self, entry: Entry) -> bool:
        """Return whether all ranks see one entry, so that only the first replica's ranks write."""
        content = entry.content()
        self.bytes_read += len(content)
        return alike(content, self._backend)

    def _agreed(self, flags: Sequence[int]) -> list[int]:
        """Return the maximum of each flag over all ranks."""
        mine = torch.tensor(list(flags), dtype=torch.int64, device=self._backend.ranks.device)
        highest: list[int] = self._backend.max_over_ranks(mine).tolist()
        return highest

    def _agreed_on_soundness(self, damaged: Sequence[int], offsets: Tensor) -> list[int]:
        """Return for each unit 0 if undamaged, else _DAMAGED, or _OFFSETS_DIFFER if ranks read different offsets."""
        values = [*damaged, *offsets.tolist(), *(-offsets).tolist()]
        highest_of_all = self._agreed(values)
        count = len(damaged)
        flags, highest, lowest = (
            highest_of_all[:count],
            highest_of_all[count : 2 * count],
            highest_of_all[2 * count :],
        )
        return [
            max(flag, _OFFSETS_DIFFER if high != -low else 0)
            for flag, high, low in zip(flags, highest, lowest, strict=True)
        ]


_DAMAGED, _OFFSETS_DIFFER = 1, 2


def _offsets_of(plan: Mapping[str, Sequence[Piece]], unit: Unit) -> list[list[float]]:
    """Return the offsets of each weight in its pieces: one, unless two nodes quantized it to different bits."""
    return [sorted({piece.extents[weight.name].offset for piece in plan[weight.name]}) for weight in unit.weights]


def open_quantized_cache(
    settings: QuantizedCacheSettings | None,
    model: CausalLM,
    headers: Mapping[str, Segment],
    sources: Mapping[str, Source],
    backend: Backend,
    boundary: watch.Marker,
) -> QuantizedCache:
    """Find the base's entry and fill the shard from it. Every rank must call it alike."""
    units = units_of(model) if settings is not None else []
    say = settings.say if settings is not None else print
    cache = QuantizedCache(units, backend, say)
    if settings is None or not units:
        return cache
    boundary(None, "looking up the base in the quantized-weights cache", long=True)
    reason = _why_unusable(settings.folder)
    if reason is not None:
        say(reason)
    if not alike("no" if reason else "yes", backend) or reason is not None:
        return QuantizedCache([], backend, say)
    files = sorted({segment.file for segment in headers.values()})
    content = content_of(files, settings.folder, backend, say, boundary)
    if content is None:
        if backend.writes:
            say("the ranks see different files of the base: its quantized weights are not cached")
        return QuantizedCache([], backend, say)
    weights = [weight for unit in units for weight in unit.weights]
    entry = Entry(settings.folder / cache_key(settings, headers, content.digests, sources, weights))
    groups = {weight.name: weight.module.num_groups for weight in weights}
    writer = QuantizedCacheWriter(entry, {"base": settings.base, "format": FORMAT, "weights": groups}, backend)
    cache.open(entry, writer, lambda: _make_room(settings, entry, sum(groups.values())), boundary)
    cache.bytes_read += content.bytes_read
    return cache


def _why_unusable(folder: Path) -> str | None:
    """Return why the cache folder cannot be used; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"quantized weights are not cached: {folder} cannot be created ({error.strerror}); set quant.cache_dir"
    return None


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


def units_of(model: CausalLM) -> list[Unit]:
    """Return the quantized weights of each decoder layer that has some."""
    paths = {module: path for path, module in model.named_modules()}
    units = []
    for number, block in enumerate(model.blocks):
        frozen = [
            Weight(model.hf_name(f"{paths[module]}.weight"), paths[module], module)
            for module in block.modules()
            if isinstance(module, FrozenTensor) and module.quantized
        ]
        if frozen:
            units.append(Unit(number, tuple(frozen)))
    return units
