"""Check that the frozen base in memory is what was loaded, and that each rank gathers what the others have.

A flipped bit in a shard, or a switch that damages data, would only make the loss slightly worse. So each rank computes
checksums of its rows after loading, and all ranks exchange them; README.md says what is checked when.

Letters: T tensors, W ranks of a replica of the base, C replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from distlora.architecture.shapes import CHECKED_AT_ONCE
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor

if TYPE_CHECKING:
    from distlora.parallel.backend import Backend
import functools

import torch.nn.functional as F

from distlora_kernels.dropout import philox


class DamagedWeightsError(RuntimeError):
    """Report frozen weights that differ from what was loaded: memory or the network is damaged. Reloading cures it."""


@dataclass(frozen=True, slots=True)
class _Frozen:
    """Frozen tensor of the base."""

    name: str
    """Hugging Face name."""
    owner: nn.Module
    attribute: str
    """Attribute of `owner` that holds the tensor, all of it while its unit is gathered."""
    rows: Tensor
    """This rank's rows, in the memory that keeps them."""
    ranges: tuple[tuple[int, int], ...]
    """(first row, rows) of each rank of a replica."""


_NOT_SAVED = "what was trained since the last save may be wrong and is not saved"
_NEXT = (
    "Continue with `distlora resume RUN`, which loads the weights again; where this comes back, exclude that node "
    "and test its memory (`nvidia-smi -q -d ECC`, memtester) and its network"
)


class FrozenWeights:
    """Checksums of the frozen base on all ranks, taken after loading."""

    def __init__(self, model: CausalLM, backend: Backend) -> None:
        """Compute and exchange the checksums. Every rank must call it alike; the host waits for the device once.

        Raises DamagedWeightsError if ranks differ in tensors that each of them holds whole.
        """
        self._model, self._backend = model, backend
        sharded, shared = list(_local_rows(model, backend)), dict(_shared(model))
        device = backend.ranks.device
        # Rows may lie in host memory.
        ours = [_of(tensor).to(device) for tensor in (*(rows for *_, rows, _ in sharded), *shared.values())]
        places = [(first, len(rows)) for *_, rows, first in sharded] + [(0, 0)] * len(shared)
        table = torch.cat([torch.stack(ours), torch.tensor(places, device=device)], dim=1)
        # (C W, T, 3): checksum, first row, rows. One exchange of a few KB per rank.
        everyone, shards = backend.gather_ranks(table), backend.shards
        by_replica = everyone[:, : len(sharded)].unflatten(0, (shards.num_replicas, shards.count))
        self._sums = by_replica[shards.replica, ..., 0].T.contiguous()
        """(T, W) int64 checksums of the tensors that are sharded over this replica's ranks."""
        ranges = by_replica[shards.replica, ..., 1:].tolist()
        self._tensors = [
            _Frozen(name, owner, attribute, rows, tuple((first, count) for first, count in of_ranks))
            for (name, owner, attribute, rows, _), of_ranks in zip(sharded, zip(*ranges, strict=True), strict=True)
        ]
        self._differs = torch.zeros_like(self._sums, dtype=torch.bool)
        """(T, W) bool: what this rank gathered differs from what that rank loaded."""
        self._handles: list[RemovableHandle] = []
        # Copies first: statistics that ranks compute depend on the bytes that they read.
        odd = (by_replica[..., 0] != by_replica[0, ..., 0]).nonzero()
        if len(odd):
            replica, index, tensor = odd[0].tolist()
            frozen, ranks = self._tensors[tensor], [shards.rank_of(index, each) for each in (0, replica)]
            raise DamagedWeightsError(
                f"{frozen.name}, {_rows(frozen.ranges[index])}, differs between rank {ranks[0]} and rank {ranks[1]} "
                "after loading, though both have the same shard of the base: are the files in model.path the "
                f"same on every node? If so, memory or a disk damages bytes. {_NEXT}"
            )
        whole = everyone[:, len(sharded) :, 0]  # (C W, tensors that every rank holds whole).
        odd = (whole != whole[0]).nonzero()
        if len(odd):
            rank, index = odd[0].tolist()
            raise DamagedWeightsError(
                f"{list(shared)[index]} differs between rank 0 and rank {rank} after loading, though both computed it "
                f"from the same numbers. {_NEXT}"
            )

    def check_next_forward(self) -> None:
        """Check everything that this rank gathers in the next forward.

        That forward ends with one all-reduce and one host read. Later forwards cost nothing.
        """
        if not self._backend.sharded or self._handles:
            return
        units = [self._model.embedding, *self._model.blocks, self._model.head, self._model]
        # The root comes first and keeps what the other units do not take.
        unit_of = {module: unit for unit in reversed(units) for module in unit.modules()}
        for unit in units:
            indices = [index for index, frozen in enumerate(self._tensors) if unit_of[frozen.owner] is unit]
            # Runs after the backend's hook, which gathers.
            self._handles.append(unit.register_forward_pre_hook(partial(self._check_gathered, indices)))
        self._handles.append(self._model.register_forward_hook(self._end_pass))

    @torch.no_grad()
    def _check_gathered(self, indices: Sequence[int], unit: nn.Module, arguments: Any) -> None:
        for index in indices:
            frozen = self._tensors[index]
            whole = self._backend.whole(frozen.owner.get_parameter(frozen.attribute))
            if isinstance(whole, DTensor):  # Divided experts, which no rank gathers.
                continue
            for ranks, rows in _batches(frozen.ranges):
                parts = whole[rows].reshape(ranks.stop - ranks.start, -1)
                self._differs[index, ranks] = checksums(parts) != self._sums[index, ranks]

    def forget_next_forward(self) -> None:
        """Cancel the check of the next forward."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _end_pass(self, model: nn.Module, arguments: Any, output: Any) -> None:
        self.forget_next_forward()
        differs = self._differs
        self._differs = torch.zeros_like(differs)
        self._end_if_damaged(differs, "nothing was trained on them")

    @torch.no_grad()
    def check_local_rows(self) -> None:
        """Check that every rank's rows are still what it loaded. Every rank must call it; the host reads one number.

        Raises DamagedWeightsError on all ranks.
        """
        index = self._backend.shards.index
        differs = torch.zeros_like(self._differs)
        sums = torch.cat([_of(frozen.rows).to(differs.device) for frozen in self._tensors])
        differs[:, index] = sums != self._sums[:, index]
        self._end_if_damaged(differs, _NOT_SAVED)
        self._check_dense_copies()

    def _check_dense_copies(self) -> None:
        for path, weight in self._model.named_modules():
            if isinstance(weight, FrozenTensor) and (copy := weight.dense_copy) is not None:
                differs = (copy != weight.stored.dense(copy.dtype)).any().int()
                if len(ranks := self._backend.gather_ranks(differs).nonzero()):
                    raise DamagedWeightsError(
                        f"the frozen base is damaged: the copy of {self._model.hf_name(path)} (quant.dense_layers) "
                        f"in the memory of rank {int(ranks[0])} is not what the weight gives; {_NOT_SAVED}. {_NEXT}"
                    )

    def _end_if_damaged(self, differs: Tensor, consequence: str) -> None:
        """Raise DamagedWeightsError on all ranks if any rank has a difference in `differs` (T, W)."""
        if not bool(self._backend.sum_over_ranks(differs.int()).any()):
            return
        # (C W, T, W), what each rank saw of its replica, to (T, C, W of the owner, W of the observer).
        shards = self._backend.shards
        seen = self._backend.gather_ranks(differs.int()).unflatten(0, (shards.num_replicas, shards.count))
        damaged: dict[tuple[int, int], list[int]] = {}
        for tensor, replica, owner, witness in seen.permute(2, 0, 3, 1).nonzero().tolist():
            damaged.setdefault((tensor, shards.rank_of(owner, replica)), []).append(shards.rank_of(witness, replica))
        (index, owner), seen_by = next(iter(damaged.items()))
        frozen = self._tensors[index]
        rows = f"{_rows(frozen.ranges[owner % shards.count])}, those of rank {owner}"
        more = f" ({len(damaged)} such parts in all)" if len(damaged) > 1 else ""
        if owner in seen_by:
            where = f"the memory of rank {owner} has changed since then"
        else:
            ranks = f"rank{'s' if len(seen_by) > 1 else ''} {', '.join(map(str, seen_by))}"
            where = (
                f"rank {owner} still has it and {ranks} got something else: the network, or the memory of "
                "those that got it, damages bytes"
            )
        raise DamagedWeightsError(
            f"the frozen base is damaged: {frozen.name}, {rows}, are not what rank {owner} loaded{more}; {where}; "
            f"{consequence}. {_NEXT}"
        )


@torch.no_grad()
def compare_trained(model: CausalLM, backend: Backend) -> None:
    """Check before training that ranks hold the same trained parameters: adapters on all ranks, shards in each replica.

    Every rank must call it alike; the host waits for the device once. Raises DamagedWeightsError on all ranks.
    """
    trained = list(_trained(model))
    if backend.ranks.group is None or not trained:
        return
    rows = [backend.local_rows(tensor)[0] for _, tensor in trained]
    ours = torch.cat([_of(tensor).to(backend.ranks.device) for tensor in rows])
    everyone, count = backend.gather_ranks(ours).cpu(), backend.shards.count  # (C W, T)
    sharded = torch.tensor([isinstance(tensor.data, DTensor) for _, tensor in trained])
    first = torch.where(sharded, everyone[:count].repeat(backend.shards.num_replicas, 1), everyone[0])
    odd = (everyone != first).nonzero()
    if len(odd):
        rank, index = odd[0].tolist()
        raise DamagedWeightsError(
            f"{trained[index][0]}, which is trained, differs between rank {rank % count if sharded[index] else 0} and "
            f"rank {rank} before the first step, though both must begin with the same numbers: are the files in "
            "model.path, in adapter.init_from where it is set, and in the run's folder the same on every node? If so, "
            f"memory or a disk damages bytes. {_NEXT}"
        )


def _trained(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all trained parameters and of DPO's reference."""
    names = {parameter: model.hf_name(path) for path, parameter in model.named_parameters() if parameter.requires_grad}
    yield from ((name, parameter) for parameter, name in names.items())
    for block in model.blocks:
        yield from ((f"the start of {names[parameter]}", start) for parameter, start in block.started.items())


def _of(rows: Tensor) -> Tensor:
    """Return the checksum as (1,) int64."""
    return checksums(rows.flatten()[None])


def _local_rows(model: CausalLM, backend: Backend) -> Iterator[tuple[str, nn.Module, str, Tensor, int]]:
    """Yield (name, owner, attribute, this rank's rows, index of the first row) of frozen tensors, a tied one once."""
    adapters, met = set(adapter_parameters(model).values()), set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or parameter in adapters or parameter in met:
                continue
            met.add(parameter)
            name = model.hf_name(f"{path}.{attribute}")
            # Keep the memory, not the Parameter: a module has another Parameter while it is gathered.
            yield name, module, attribute, *backend.local_rows(parameter)


def _shared(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of unsharded parts of frozen weights: their offsets and row norms."""
    for path, module in model.named_modules():
        if isinstance(module, FrozenTensor):
            for name, buffer in module.named_buffers(recurse=False):
                yield model.hf_name(f"{path}.{name}"), buffer


def _batches(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, slice]]:
    """Yield (ranks, rows): consecutive ranks that own equally many rows, so that one call covers them."""
    start = 0
    while start < len(ranges):
        (first, count), stop = ranges[start], start + 1
        while stop < len(ranges) and ranges[stop] == (first + (stop - start) * count, count):
            stop += 1
        if count:
            yield slice(start, stop), slice(first, first + (stop - start) * count)
        start = stop


def _rows(of_rank: tuple[int, int]) -> str:
    first, count = of_rank
    return f"rows {first:,} to {first + count - 1:,}"


LINE = 2**14
"""32-bit words per line of a checksum. A line's sum, modulo 2^64, weights each word by its position; the sums, as words
form lines again until one is left: the checksum, the same on CPU and GPU.

Every change of one word and every exchange of two bytes or words within a line is detected: weights are odd, and those
of two positions differ by an odd number times at most 2^14, so no such difference is a multiple of 2^64. Other changes
are missed once in about 2^60, because the weights' upper bits are random. Trailing zeros are not counted.
"""
_WORD_BYTES = 4
_LINE_BYTES = LINE * _WORD_BYTES
_KEY = (0x64697374, 0x6C6F7261)


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """Return (LINE,) int64 weights: 2 c + 1 and, from bit 33 on, 30 random bits."""
    places = torch.arange(LINE, dtype=torch.int64, device=device)
    zero = torch.zeros_like(places)
    random, *_ = philox(_KEY, (places, zero, zero, zero))
    return 2 * places + 1 + ((random & (2**30 - 1)) << 33)


@torch.no_grad()
def checksums(parts: Tensor) -> Tensor:
    """Return (P,) int64 checksums of `parts` (P, n) of any dtype, each part contiguous. Stays on the device."""
    assert parts.dim() == 2
    while True:
        sums = _line_sums(parts.view(torch.uint8))
        if sums.shape[1] <= 1:
            return sums.sum(dim=1)
        parts = sums


def _line_sums(parts: Tensor) -> Tensor:
    """Return (P, lines) int64 from (P, n) uint8."""
    weights = _weights(parts.device)
    num_parts, num_bytes = parts.shape
    lines = max(CHECKED_AT_ONCE[parts.device.type] // LINE // max(num_parts, 1), 1)
    whole = num_bytes - num_bytes % _LINE_BYTES
    sums = []
    # One buffer for all chunks: on a CPU fresh memory costs more than the sums.
    buffer = torch.empty(num_parts, min(lines, whole // _LINE_BYTES), LINE, dtype=torch.int64, device=parts.device)
    for start in range(0, whole, lines * _LINE_BYTES):
        words = _words(parts[:, start : min(start + lines * _LINE_BYTES, whole)]).unflatten(1, (-1, LINE))
        sums.append(buffer[:, : words.shape[1]].copy_(words).mul_(weights).sum(dim=2))
    if whole < num_bytes:
        sums.append(_short_line_sums(_words(parts[:, whole:]), weights)[:, None])
    return torch.cat([weights.new_empty(num_parts, 0), *sums], dim=1)


def _short_line_sums(words: Tensor, weights: Tensor) -> Tensor:
    """Return (P,) int64 from (P, n) int32 with n < LINE."""
    num_parts, length = words.shape
    at_once = min(CHECKED_AT_ONCE[words.device.type] // length, max(num_parts, 1))
    buffer = torch.empty(at_once, length, dtype=torch.int64, device=words.device)
    sums = weights.new_empty(num_parts)
    for start in range(0, num_parts, at_once):
        some = words[start : start + at_once]
        torch.sum(buffer[: len(some)].copy_(some).mul_(weights[:length]), dim=1, out=sums[start : start + at_once])
    return sums


def _words(parts: Tensor) -> Tensor:
    """View (P, n) uint8 as (P, ceil(n / 4)) int32, without a copy if each part begins and ends at a word boundary."""
    missing = -parts.shape[1] % _WORD_BYTES
    if missing:
        parts = F.pad(parts, (0, missing))
    elif parts.storage_offset() % _WORD_BYTES or parts.stride(0) % _WORD_BYTES:
        parts = parts.clone(memory_format=torch.contiguous_format)
    return parts.view(torch.int32)
