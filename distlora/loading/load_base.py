"""Load the base's weights from a checkpoint into the shards of a parallelized model; each rank reads only its bytes.

A start reads its groups from the quantized-weights cache instead of quantizing them again. An entry is a folder of
quantized weights as `distlora export --format bnb` writes them (`weights/low_bit/codecs.py`), a file per decoder layer;
fused experts and merged tensors have the model's names. All ranks write their groups into one temporary folder, which
then gets its name. A start on any number of ranks reads its groups from it, as from any checkpoint in NF4, and the rest
from the base.

The checksum of a weight is a sum over its groups, so any number of ranks compare it in one exchange. All ranks use an
entry, or none: if one finds it missing, damaged or unreadable, all quantize the base. The result is bit for bit the
same with and without the cache. No fault of the cache ends a run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.kept_weights import is_kept, nf4_outside_layers
from distlora.architecture.low_bit_headers import LowBitSegment, in_nf4, nf4_config, nf4_tensors
from distlora.architecture.safetensors_headers import SOURCE_DTYPES, Segment, check_stored_shape
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.config import UserError, require
from distlora.config.json_files import read_object
from distlora.loading.fill_weight import copy_into, fill_kept, fill_row_norms, load_matrix, quantize_into
from distlora.model.adapters import AdaptedLinear, adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.hf_model import stored_buffers
from distlora.parallel import Backend, watch, whole_shape
from distlora.parallel.integrity import checksums
from distlora.system import atomic_io, numbers
from distlora.weights.conversion import ParameterSource, find_sources, names_without_a_place
from distlora.weights.decompose import LowRankFactors, Residual
from distlora.weights.low_bit.codecs import write_groups, write_statistics
from distlora.weights.quantized_cache_folder import ENTRY_NAME, make_room, remove, remove_leftovers, touch
from distlora.weights.reader import DTYPE_NAMES, Reader
from distlora.weights.writer import Files, lay_out_files, write_index
from distlora_kernels.formats import nf4

ENTRY_FORMAT = 3
"""Version of an entry's files."""
QUANTIZATION = {"format": ENTRY_FORMAT, "kernels": 1, "block": nf4.BLOCK, "blocks_per_group": nf4.BLOCKS_PER_GROUP}
"""Description of the quantization, part of an entry's key. Increase `kernels` after any change of the bits that
`quantize_into` writes.
"""
ENTRY_DTYPE = "bfloat16"
"""Dtype in which bitsandbytes would compute with an entry."""
CACHE_CHUNK_GROUPS = 128
"""Groups checked or written at once: 1 MiB of codes, which fits into a core's cache."""
FREE_SHARE, FREE_BYTES = 0.05, 50 * 10**9
"""Free space that the cache leaves on a disk: the smaller of this fraction and these bytes."""
WHOLE, ABSENT, OF_OTHER_RANKS, UNREADABLE, DAMAGED = range(5)
"""How a rank finds an entry, the worst last."""
Value = TypeVar("Value")


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


class QuantizedCache:
    """One load's use of the cache. A context manager: at its end what was quantized is on the disk."""

    def __init__(
        self, model: CausalLM, headers: Mapping[str, Segment], sources: Mapping[str, ParameterSource], backend: Backend
    ) -> None:
        """Prepare a cache that holds nothing without `open`. `headers`: of the base's files."""
        paths = {module: path for path, module in model.named_modules()}
        frozen = [[m for m in block.modules() if isinstance(m, FrozenTensor)] for block in model.blocks]
        layers = [{model.hf_name(f"{paths[m]}.weight"): m for m in layer if m.format is nf4.NF4} for layer in frozen]
        self._layers: Sequence[Mapping[str, FrozenTensor]] = [layer for layer in layers if layer]
        self._weights = {name: weight for layer in self._layers for name, weight in layer.items()}
        self._backend, self._sources = backend, sources
        self._settings: QuantizedCacheSettings
        self._base_files = sorted({segment.file for segment in headers.values()})
        self._entry = self._temporary = Path()
        self._found = WHOLE
        self.filled = False
        """True if every quantized weight came from the cache."""
        self.bytes_read = self.bytes_written = 0
        self._files: Files | None = None
        """Files of the entry that all ranks write; None: nothing is written."""
        self._creators: list[bool] = []
        """For each rank, True if it made the temporary folder: rank 0 alone, unless nodes have disks of their own."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-cache")
        self._jobs: list[Future[None]] = []
        self._sums: dict[str, Tensor] = {}

    def __enter__(self) -> QuantizedCache:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._thread.shutdown(cancel_futures=error is not None)
        if self._files is None:
            return
        is_written, is_kept, created = False, False, self._creators[self._backend.ranks.rank]
        with self._refusing(), self._files as files:
            if error is None:
                for job in self._jobs:
                    job.result()
                files.sync()
                is_written = self._entry.name == self._key()  # The base may have changed meanwhile.
        if error is None and all(gathered(is_written, self._backend)):
            sums = sums_over_ranks(list(self._sums.values()), self._backend)[0]
            with self._refusing():
                if created:
                    self._publish(dict(zip(self._sums, sums, strict=True)))
                is_kept = True
            is_kept = all(gathered(is_kept, self._backend))
        if not is_kept:
            self.bytes_written = 0
        if created:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def open(self, settings: QuantizedCacheSettings, boundary: watch.Marker) -> None:
        """Fill the shards from the base's entry, or prepare to write it. Every rank must call it alike."""
        self._settings = settings
        backend, folder, key = self._backend, settings.folder, ""
        boundary(None, "looking up the base in the quantized-weights cache", long=True)
        try:
            atomic_io.private_folder(folder)
            # A weight that the base lacks is reported where it is loaded.
            key = self._key() if self._weights and self._weights.keys() <= self._sources.keys() else ""
        except OSError as error:
            self._say(f"{folder} cannot be created ({error.strerror}); set quant.cache_dir")
        keys = set(gathered(key, backend))
        if len(keys) > 1 and "" not in keys and backend.writes:
            self._say("the ranks see different files of the base, or copies of another time (cp -p keeps it)")
        if len(keys) > 1 or not key:
            return
        self._entry = folder / key
        state = self._read(boundary)
        self.filled = state == WHOLE
        if state in (ABSENT, OF_OTHER_RANKS, DAMAGED):
            self._begin()

    def has(self, name: str) -> bool:
        """Return whether a weight is in the shard already, by its Hugging Face name."""
        return self.filled and name in self._weights

    def quantized(self, name: str) -> None:
        """Record that a weight was quantized; it is written while the next ones are, and must not change meanwhile."""
        if self._files is not None and name in self._weights:
            self._jobs.append(self._thread.submit(self._write, name, self._weights[name], self._files))

    def _key(self) -> str:
        """Return the name of the entry, 64 hex digits, which tells the base and its quantization.

        The location of the base's files does not matter. Raises OSError if one is gone.
        """
        content = {
            "quantization": QUANTIZATION,
            "base": self._settings.identity,
            "made_on": self._settings.made_on,
            "files": [state_of(file) for file in self._base_files],
            "weights": [[n, w.shape, self._sources[n].names] for n, w in sorted(self._weights.items())],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _read(self, boundary: watch.Marker) -> int:
        """Fill the shards; return how that rank finds the entry that finds it worst. Every rank must call it alike.

        The shards are undefined unless it is WHOLE. An entry that is damaged or of other ranks is removed.
        """
        backend, sums = self._backend, dict[str, int]()
        tensors: Mapping[str, Segment] = {}
        with self._noting():
            tensors, sums = self._open_entry()
        state = max(gathered(self._found, backend))
        if state == WHOLE:
            with Reader() as reader:
                for number, layer in enumerate(self._layers):
                    boundary(None, f"reading layer {number} from the quantized-weights cache", long=True)
                    for name, weight in layer.items():
                        if self._found == WHOLE:
                            with self._noting():
                                fill_kept(weight, [tensors[name]], reader, backend, name)
                self.bytes_read = reader.bytes_read
            state = max(gathered(self._found, backend))
        if state == WHOLE:
            by_replica = sums_over_ranks([checksum_of(weight, backend) for weight in self._weights.values()], backend)
            wrong = [name for name, *of in zip(self._weights, *by_replica, strict=True) if {*of} != {sums[name]}]
            if wrong:
                state = DAMAGED
                self._report_damage(f"{wrong[0]} has other bytes")
        if state in (OF_OTHER_RANKS, DAMAGED):
            if backend.ranks.leads_machine:
                with contextlib.suppress(OSError):
                    remove(self._entry)
            gathered(state, backend)  # Until it is removed.
        return state

    def _open_entry(self) -> tuple[Mapping[str, Segment], dict[str, int]]:
        """Return the entry's weights and their checksums; none if it is of other ranks.

        Raises OSError or UserError if this rank cannot read them.
        """
        record, shards = self._entry / ENTRY_NAME, self._backend.shards
        if not record.exists():
            raise FileNotFoundError(record)
        touch(self._entry)
        values = read_object(record, "", {"checksums": {"*": int}, "shards": int, "held": [int]})
        is_held = shards.count == values["shards"] and shards.index in values["held"]
        if not is_held and len(values["held"]) < values["shards"]:
            self._found = OF_OTHER_RANKS  # Written on this node's disk by ranks with other groups.
            return {}, {}
        tensors = CheckpointFiles(self._entry).headers
        is_nf4 = all(is_kept(nf4.NF4.name, [segment]) for segment in tensors.values())
        require(is_nf4 and self._weights.keys() == tensors.keys() == values["checksums"].keys(), "it has other weights")
        return tensors, values["checksums"]

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Note how this rank finds the entry if the block, which reads it, fails."""
        try:
            yield
        except FileNotFoundError:
            self._found = ABSENT
        except OSError as error:
            self._found = UNREADABLE
            self._say(f"{self._entry} cannot be read now ({error.strerror or error}); quantizing this time")
        except UserError as error:
            self._found = DAMAGED
            self._report_damage(str(error).partition(";")[0])

    def _report_damage(self, reason: str) -> None:
        self._say(f"{self._entry} is damaged ({reason}); removed, quantizing again")

    def _say(self, line: str) -> None:
        self._settings.say(f"quantized-weights cache: {line}")

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Report an OSError of the block, which writes into the cache."""
        try:
            yield
        except OSError as error:
            self._say(f"{self._settings.folder} cannot be written ({error.strerror or error}); nothing is kept")

    def _begin(self) -> None:
        """Make the entry's temporary folder and open its files, if every rank can. Every rank must call it alike."""
        backend, created, files = self._backend, False, None
        tables = {
            f"model-{number:05}-of-{len(self._layers):05}.safetensors": {
                name: tensor
                for path, weight in layer.items()
                for name, tensor in nf4_tensors(path, weight.shape).items()
            }
            for number, layer in enumerate(self._layers, start=1)
        }
        self._plan = plan = lay_out_files(tables, {})
        token = gathered(secrets.token_hex(8), backend)[0]
        self._temporary = self._entry.with_name(f".{self._entry.name}-{token}")
        # The first rank of a node that does not see rank 0's folder makes one on its own disk.
        for makes in (backend.writes, backend.ranks.leads_machine and not backend.writes):
            if makes and not self._temporary.exists() and self._has_room(sum(plan.sizes.values())):
                with self._refusing(), contextlib.suppress(FileExistsError):  # Another node on this disk was first.
                    self._temporary.mkdir()
                    created = True
                    Files(self._temporary, plan).close()
            self._creators = gathered(created, backend)
            if not any(self._creators):
                break  # Without rank 0's groups nothing is kept.
        if self._temporary.exists():
            with self._refusing():
                files = Files(self._temporary, plan, create=False)
        if all(gathered(files is not None, backend)):
            self._files = files
            return
        if files is not None:
            files.close()
        if created:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _has_room(self, num_bytes: int) -> bool:
        """Remove what the cache has no room for; return whether an entry of `num_bytes` fits."""
        folder, limit = self._settings.folder, self._settings.limit
        with self._refusing():
            remove_leftovers(folder)
            removed, fits = make_room(folder, self._entry.name, num_bytes, limit)
            for other in removed:
                self._say(f"removed {other.base} ({numbers.size(other.num_bytes)}, least recently used)")
            disk = shutil.disk_usage(folder)
            kept_free = min(FREE_SHARE * disk.total, FREE_BYTES)
            if fits and disk.free - num_bytes >= kept_free:
                return True
            reason = f"of {numbers.size(disk.free)} free on the disk, {numbers.size(kept_free)} stay free"
            if not fits and limit is not None:
                reason = f"quant.cache_gb={limit / 1e9:g} leaves no room beside entries in use or of other users"
            self._say(f"{numbers.size(num_bytes)} are not kept: {reason}")
        return False

    @torch.no_grad()
    def _write(self, name: str, weight: FrozenTensor, files: Files) -> None:
        """Write this rank's groups of a weight, and take their checksum."""
        self._sums[name] = checksum_of(weight, self._backend)
        parts, first = self._backend.local_groups(weight)
        # One replica writes a folder that all see.
        is_needed = self._backend.shards.replica == 0 or sum(self._creators) > 1
        for at in range(0, len(parts[0]) if is_needed else 0, CACHE_CHUNK_GROUPS):
            chunk = [part[at : at + CACHE_CHUNK_GROUPS].cpu() for part in parts]
            write_groups(files, name, weight.shape, first + at, chunk)
            self.bytes_written += sum(part.nbytes for part in chunk)
        if self._creators[self._backend.ranks.rank]:
            write_statistics(files, name, weight.shape, weight.get_buffer("offset"), ENTRY_DTYPE)

    def _publish(self, sums: Mapping[str, int]) -> None:
        """Give the temporary folder its name, unless another run was first. Raises OSError if it cannot."""
        count, creators = self._backend.shards.count, self._creators
        made_by = [max(maker for maker in range(rank + 1) if creators[maker]) for rank in range(len(creators))]
        held = {rank % count for rank, maker in enumerate(made_by) if maker == self._backend.ranks.rank}
        record = {"base": self._settings.base, "format": ENTRY_FORMAT, "shards": count, "held": sorted(held)}
        write_index(self._temporary, self._plan)
        atomic_io.write_json(self._temporary / "config.json", {"quantization_config": nf4_config(ENTRY_DTYPE, [])})
        atomic_io.write_json(self._temporary / ENTRY_NAME, {**record, "checksums": sums})
        try:
            self._temporary.rename(self._entry)
        except OSError:
            if not self._entry.exists():
                raise
            if not (self._entry / ENTRY_NAME).exists():  # A removal that was killed left the rest.
                remove(self._entry)
                if self._entry.exists():
                    raise OSError(errno.ENOTEMPTY, f"{self._entry.name} holds files of other programs") from None
                self._temporary.rename(self._entry)
        atomic_io.sync(self._entry.parent)


def state_of(file: Path) -> str:
    """Return what changes with a file of the base: its name in the hub's cache, which is its SHA-256, or size and time.

    Raises OSError if there is none.
    """
    blob = file.resolve()
    is_blob = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    if file.is_symlink() and is_blob and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    status = blob.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def checksum_of(weight: FrozenTensor, backend: Backend) -> Tensor:
    """Return the sum of the checksums of this rank's groups, modulo 2^64: () int64 on the device of the groups.

    The numbers of the groups and the offset are included, so that another group's bytes, or lost bytes that are read
    as zeros, give another sum.
    """
    parts, first = backend.local_groups(weight)
    total = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    offset = weight.get_buffer("offset").view(torch.int32).to(total.device, torch.int64)
    for at in range(0, len(parts[0]), CACHE_CHUNK_GROUPS):
        chunk = [part[at : at + CACHE_CHUNK_GROUPS] for part in parts]
        ordinals = torch.arange(1, len(chunk[0]) + 1, device=total.device) + (first + at)  # Not 0: so are zeros' sums.
        sums = [checksums(part.view(len(part), -1)) for part in chunk]
        total += checksums(torch.stack([*sums, ordinals, offset.expand(len(ordinals))], dim=1)).sum()
    return total


def sums_over_ranks(own: Sequence[Tensor], backend: Backend) -> list[list[int]]:
    """Return for each replica the sum of its ranks' checksums of each weight, modulo 2^64."""
    everyone = backend.gather_ranks(torch.stack([tensor.to(backend.ranks.device) for tensor in own]))
    sums: list[list[int]] = everyone.unflatten(0, (backend.shards.num_replicas, -1)).sum(dim=1).tolist()
    return sums


def gathered(value: Value, backend: Backend) -> list[Value]:
    """Return the JSON values of all ranks, in the order of ranks. Every rank must call it alike."""
    content, device = json.dumps(value).encode(), backend.ranks.device
    length = int(backend.max_over_ranks(torch.tensor([len(content)], dtype=torch.int64, device=device)))
    padded = torch.frombuffer(bytearray(content.ljust(length)), dtype=torch.uint8).to(device)
    return [json.loads(row.numpy().tobytes()) for row in backend.gather_ranks(padded).cpu()]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Results of loading on this rank."""

    seconds: float
    bytes_read: int
    quantized_weights: int
    """Weights of the whole model that are kept in low bits."""
    quantized_bytes: int
    """Their bytes over all ranks, without FSDP2's padding."""
    prequantized: bool
    """True if the checkpoint has them in low bits, which are kept as they are."""
    from_cache: bool = False
    """True if they came from the quantized-weights cache."""
    cache_bytes_written: int = 0
    """Bytes that this rank wrote into the cache."""

    @property
    def how(self) -> str:
        """Return the origin of the quantized weights for a log line."""
        if self.prequantized:
            return "as stored"
        if self.from_cache:
            return "from the quantized-weights cache"
        return "and quantized and cached" if self.cache_bytes_written else "and quantized"

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per quantized weight; None if there are none."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None


def load_base(
    model: CausalLM,
    base: CheckpointFiles,
    backend: Backend,
    *,
    subtract_initial_adapter: bool = False,
    cache: QuantizedCacheSettings | None = None,
    boundary: watch.Marker = watch.at,
) -> Loaded:
    """Fill every parameter of the base, and every buffer that a checkpoint holds, from the checkpoint.

    `subtract_initial_adapter`: load adapted weights minus what their adapter computes now (PiSSA). `cache`: the
    quantized-weights cache; None disables it. `boundary` marks each weight, on every rank alike. Raises UserError for a
    missing, misshapen or non-finite tensor.
    """
    began = time.monotonic()
    sources = find_base(model, base.headers)
    adapters = set(adapter_parameters(model))
    token_matrices = {f"decoder.{model.architecture.embedding}.weight": EMBEDDING, "head.weight": HEAD}
    quantized_weights = quantized_bytes = kept = 0
    with Reader() as reader, QuantizedCache(model, base.stored, sources, backend) as cached:
        if cache is not None and not any(in_nf4(source.segments[0]) for source in sources.values()):
            cached.open(cache, boundary)
        for path, module in model.named_modules():
            boundary(None, f"loading {path}", long=True)
            residual = None
            if subtract_initial_adapter and isinstance(module, AdaptedLinear):
                (pair,) = module.pairs
                residual = Residual(LowRankFactors(pair.A, pair.B), pair.scaling)
            if isinstance(module, FrozenTensor) and module.format is not None:
                name = model.hf_name(f"{path}.weight")
                if is_kept(module.format.name, source_of(sources, name).segments):
                    fill_kept(module, sources[name].segments, reader, backend, name)
                    kept += module.numel
                elif not cached.has(name):
                    segments = segments_of(sources, name, module.shape)
                    quantize_into(module, segments, reader, backend, name, residual=residual)
                    cached.quantized(name)
                quantized_weights += module.numel
                quantized_bytes += module.packed_bytes
            for local_name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{local_name}" if path else local_name
                is_packed = isinstance(module, FrozenTensor) and local_name in module.part_names
                if is_packed or full in adapters or (full == "head.weight" and model.tied):
                    continue
                name = model.hf_name(full)
                matrix = token_matrices.get(full)
                if matrix is None:
                    shape = tuple(whole_shape(parameter))
                    segments = segments_of(sources, name, shape, dequantizes_nf4=full.startswith("merger."))
                    taken = residual if local_name == "weight" else None
                    copy_into(parameter, segments, reader, backend, name, residual=taken)
                    continue
                segments = segments_of(sources, name, (model.vocabulary.stored, whole_shape(parameter)[1]))
                rows, tokens = model.rows_of(matrix), model.vocabulary
                zeroed = model.layout.zeroed_row if matrix == EMBEDDING or model.tied_in_base else None
                load_matrix(
                    parameter, segments, reader, backend, name, vocabulary=tokens, token_rows=rows, zeroed=zeroed
                )
            if isinstance(module, AdaptedLinear) and module.row_norms_squared is not None:
                fill_row_norms(module, backend)
        _load_buffers(model, sources, reader, backend)
        bytes_read = reader.bytes_read + cached.bytes_read
        boundary(None, "writing the quantized-weights cache", long=True)
    return Loaded(
        seconds=time.monotonic() - began,
        bytes_read=bytes_read,
        quantized_weights=quantized_weights,
        quantized_bytes=quantized_bytes,
        prequantized=kept > 0,
        from_cache=cached.filled,
        cache_bytes_written=cached.bytes_written,
    )


def _load_buffers(model: CausalLM, sources: Mapping[str, ParameterSource], reader: Reader, backend: Backend) -> None:
    for name, buffer in stored_buffers(model).items():
        dtypes = SOURCE_DTYPES if buffer.is_floating_point() else (DTYPE_NAMES[buffer.dtype],)
        copy_into(buffer, segments_of(sources, name, tuple(buffer.shape), dtypes), reader, backend, name)


def find_base(model: CausalLM, headers: Mapping[str, Segment]) -> dict[str, ParameterSource]:
    """Return the tensors on disk of each parameter of the base, by its Hugging Face name.

    Tensors outside of the decoder and its LM head (a vision tower's) are left alone in a model for text. Raises
    UserError if the checkpoint and config.json describe different models: weights without a place, or tied weights that
    differ.
    """
    layout, scope = model.layout, model.architecture.decoder
    strays = names_without_a_place(layout, headers, scope)
    if strays:
        raise UserError(
            f"the checkpoint holds {strays[0]} ({len(strays)} such tensors), which config.json does not "
            "describe, so the model would run without it; download the folder again"
        )
    parts = (scope, layout.head) if model.image_layout is None else (scope, layout.head, model.image_layout.merger)
    wanted = {name for name in layout.names if name.startswith(tuple(f"{part}." for part in parts))}
    wanted |= {model.hf_name(f"head.{name}") for name, _ in model.head.named_parameters()}
    sources = find_sources(layout, headers, wanted)
    for name, other in layout.tied.items():
        # transformers leaves them untied then, despite config.json.
        if {name, other} <= sources.keys() and _sample(sources[name]) != _sample(sources[other]):
            cure = "set tie_word_embeddings to false in config.json"
            raise UserError(
                f"transformers ties {name} to {other}, but {sources[name].names[0]} and {sources[other].names[0]} "
                f"differ on disk; {cure if other == layout.embedding else 'download the folder again'}"
            )
    return sources


def _sample(source: ParameterSource) -> bytes:
    """Read 64 KiB from the middle of a matrix: matrices that were trained apart differ everywhere."""
    segment = source.segments[len(source.segments) // 2]
    if isinstance(segment, LowBitSegment):
        segment = next(iter(segment.tensor.parts.values()))
    with segment.file.open("rb") as stream:
        stream.seek(segment.offset + max(segment.num_bytes // 2 - 2**15, 0))
        return stream.read(min(2**16, segment.num_bytes))


def segments_of(
    sources: Mapping[str, ParameterSource],
    name: str,
    shape: tuple[int, ...],
    dtypes: Collection[str] = SOURCE_DTYPES,
    *,
    dequantizes_nf4: bool = False,
) -> Sequence[Segment]:
    """Return a parameter's segments by its Hugging Face name.

    `dequantizes_nf4`: a weight in NF4 is read as its values, as weights in other low-bit formats are. Raises UserError
    if it is absent or contradicts config.json.
    """
    source = source_of(sources, name)
    check_stored_shape(name, source.shape, shape)
    if in_nf4(source.segments[0]) and not dequantizes_nf4:
        raise nf4_outside_layers(name)
    dtype = source.segments[0].dtype
    if dtype not in dtypes and not (dtypes is SOURCE_DTYPES and isinstance(source.segments[0], LowBitSegment)):
        raise UserError(
            f"{name} is stored as {dtype}; it is read from {', '.join(dtypes)}: set {{model.path}} to such a copy"
        )
    return source.segments


def source_of(sources: Mapping[str, ParameterSource], name: str) -> ParameterSource:
    """Return a parameter's tensors on disk by its Hugging Face name. Raises UserError if it is absent."""
    if name not in sources:
        raise UserError(f"the checkpoint has no tensor {name}, which config.json describes; download the folder again")
    return sources[name]
