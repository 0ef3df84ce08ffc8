"""Calculate the bytes of gathered units, by the part of a step, for FSDP2 and DeepSpeed ZeRO-3. Imports no torch.

FSDP2 (torch 2.13, _fsdp_param_group.py): a gather has an output of all ranks' rows, out of which each parameter is
copied. A unit takes its bytes twice until the output is freed: in forward when the next unit is copied or the root is
done, in backward at once. A gather ahead has an output too. So a layer in forward with prefetch takes three layers'
bytes: its own, its output, the next one's output; in backward two. One process gathers nothing, and computes with
16-bit copies of what it trains of the base (distlora/parallel/fsdp2.py).

DeepSpeed 0.19.8 (partitioned_param_coordinator.py, partition_parameters.py: all_gather_coalesced): tensors of a unit
that are not on their way are gathered when it is needed. Then the next tensors are gathered ahead until a bucket's
elements, or those that may be live at once, are reached. Tensors gathered together come in one flat buffer per dtype;
when one is waited for, all are copied out, and the buffer is freed when the last was waited for. A tensor that is
gathered alone comes in place. distlora/parallel/zero3.py has the units, and keeps a GPU at most two units behind.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from distlora.config.deepspeed_file import Gathering, read_gathering
from distlora.planner.memory.base import BaseSizes, BaseTensor, Gathered, unit_bytes
from distlora.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class CastCopies:
    """Bytes of 16-bit copies of trained masters in one process."""

    embedding: int = 0
    block: int = 0
    """Bytes of one layer while it runs, and in its backward."""
    kept: int = 0
    """Bytes of all layers from forward to backward without recomputation."""
    head: int = 0
    """Bytes of the LM head from its forward to its backward."""


def gathered_of(work: Workload, base: BaseSizes, shards: int, resident: int, *, is_gpu: bool) -> Gathered:
    """Return the gathered bytes of a base sharded over `shards` ranks, with `resident` blocks that stay gathered."""
    if shards == 1:
        return Gathered()
    if work.parallel.backend == "zero3":
        return _with_experts(coordinated(base, shards, read_gathering(work.parallel), is_gpu=is_gpu), base, shards)
    parts = (base.embedding, base.block, base.head, base.rest)
    embedding, block, head, rest = (unit_bytes(part, shards) for part in parts)
    moved = base.layers - resident
    whole = embedding if base.tied else 0
    # The output of the last unit that was copied out: of the embedding, where all blocks stay.
    in_use, output = (block, block) if moved else (0, embedding)
    another = block if moved > 1 else 0
    ahead = another if work.parallel.prefetch else 0
    trains_head = any(tensor.trained for tensor in base.head or base.embedding)
    # A tied unit that is trained is gathered again for the head's backward, and stays until the embedding's.
    behind = rest + (whole if trains_head else 0)
    return Gathered(
        copying=rest + whole + 2 * head + output,
        # The output that a tied unit came in is there until the first block is copied out.
        embedding=rest + 2 * embedding + (in_use if base.tied else 0),
        forward=rest + whole + in_use + output + ahead,
        last=rest + whole + in_use + output,
        head=rest + (whole + output if base.tied else 2 * head),
        head_backward=behind + in_use + (head if trains_head else 0),
        block=behind + in_use + another,
        # Where the first blocks stay, the first one is none that moves.
        first=behind + (in_use if resident == 0 else 0),
    )


def _with_experts(gathered: Gathered, base: BaseSizes, shards: int) -> Gathered:
    """Add experts that are gathered on demand: a layer's whole weights, as all may be chosen.

    While one is gathered, so are the rows that a rank sends, and those of all.
    """
    whole = sum(tensor.compute_itemsize * tensor.numel for weight in base.apart for tensor in weight)
    padded = (sum(replace(tensor, divided=False).whole(shards) for tensor in weight) for weight in base.apart)
    sent = max(padded, default=0) * (shards + 1) // shards
    return replace(
        gathered,
        forward=gathered.forward + whole,
        last=gathered.last + whole,
        copying=max(gathered.copying, max(gathered.forward, gathered.last) + whole + sent),
        block=gathered.block + whole,
        first=gathered.first + whole,
    )


def copied_of(work: Workload, base: BaseSizes, shards: int) -> CastCopies:
    """Return the bytes of 16-bit copies of trained masters; only one process has any."""
    if shards > 1:
        return CastCopies()
    embedding, block, head = (_copies(unit) for unit in (base.embedding, base.block, base.head or base.embedding))
    keeps = work.train.checkpointing == "none"
    return CastCopies(
        embedding=embedding,
        block=0 if keeps else block,
        kept=base.total(_copies) if keeps else 0,
        head=head,
    )


def _copies(unit: Iterable[BaseTensor]) -> int:
    return sum(tensor.compute_itemsize * tensor.numel for tensor in unit if tensor.itemsize != tensor.compute_itemsize)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a unit: elements and bytes, padded to a multiple of the ranks."""

    numel: int
    nbytes: int
    stays: bool = False
    """True if it stays gathered."""


_Unit = tuple[_Tensor, ...]


@dataclass(slots=True)
class _Group:
    """Tensors that come in one buffer."""

    nbytes: int
    waiting: set[int]
    """Tensors that were not waited for yet."""
    is_copied: bool = False


@dataclass(slots=True)
class _Coordinator:
    """The state of a step. Tensors are numbers; `units` has those of each place in the order of a step."""

    units: Sequence[Sequence[int]]
    tensors: Sequence[_Tensor]
    bucket: int
    """Elements that are gathered ahead."""
    most: int
    """Elements that may be gathered at once."""
    reuse: int
    one_by_one: bool
    place: int = 0
    there: set[int] = field(default_factory=set)
    coming: dict[int, _Group] = field(default_factory=dict)
    groups: list[_Group] = field(default_factory=list)
    fetched_for: dict[int, int] = field(default_factory=dict)
    queue: collections.deque[tuple[int, int]] = field(init=False)
    """(tensor, place)."""
    elements: int = 0

    def __post_init__(self) -> None:
        self.queue = collections.deque((t, place) for place, unit in enumerate(self.units) for t in unit)
        self.there.update(t for t, tensor in enumerate(self.tensors) if tensor.stays)
        self.elements = sum(self.tensors[t].numel for t in self.there)

    @property
    def nbytes(self) -> int:
        """Bytes of gathered tensors that will be freed, and of buffers in flight."""
        there = (self.tensors[t] for t in self.there)
        return sum(each.nbytes for each in there if not each.stays) + sum(group.nbytes for group in self.groups)

    def gather(self, tensors: Sequence[int]) -> None:
        if not tensors:
            return
        self.elements += sum(self.tensors[t].numel for t in tensors)
        if len(tensors) == 1 or self.one_by_one:  # Comes in place.
            self.there.update(tensors)
            return
        group = _Group(sum(self.tensors[t].nbytes for t in tensors), set(tensors))
        self.groups.append(group)
        self.coming.update(dict.fromkeys(tensors, group))

    def fetch(self) -> int:
        """Gather the unit at this place, and return the most bytes while it is copied out."""
        unit = self.units[self.place]
        self.gather([t for t in unit if t not in self.there and t not in self.coming])
        most = self.nbytes
        for tensor in unit:
            group = self.coming.get(tensor)
            if group is not None and tensor in group.waiting:
                if not group.is_copied:
                    self.there.update(group.waiting)
                    group.is_copied = True
                    most = max(most, self.nbytes)
                group.waiting.discard(tensor)
                if not group.waiting:
                    self.groups.remove(group)
                    self.coming = {t: other for t, other in self.coming.items() if other is not group}
        self._ahead(unit)
        self.place += 1
        return max(most, self.nbytes)

    def _ahead(self, unit: Sequence[int]) -> None:
        new = {t for t in unit if self.fetched_for.get(t, -1) < self.place}
        while new:
            tensor, place = self.queue.popleft()
            self.fetched_for[tensor] = place
            new.discard(tensor)
        most, chosen, numel = min(self.most - self.elements, self.bucket), [], 0
        while self.queue and numel < most:
            tensor, place = self.queue.popleft()
            self.fetched_for[tensor] = max(self.fetched_for.get(tensor, -1), place)
            if tensor not in self.there and tensor not in self.coming and tensor not in chosen:
                chosen.append(tensor)
                numel += self.tensors[tensor].numel
        self.gather(chosen)

    def release(self, unit: Sequence[int]) -> None:
        """Release the unit at this place."""
        kept = {t for t in unit if self.fetched_for.get(t, -1) > self.place}
        passed = 0
        for following in self.units[self.place :]:
            if passed >= self.reuse:
                break
            kept.update(following)
            passed += sum(self.tensors[t].numel for t in following)
        for tensor in unit:
            if tensor not in kept and tensor in self.there and not self.tensors[tensor].stays:
                self.there.discard(tensor)
                self.elements -= self.tensors[tensor].numel


@functools.lru_cache(maxsize=64)  # Each tensor of each block is looked at, and a search asks hundreds of times.
def staying_bytes(base: BaseSizes, shards: int, gathering: Gathering) -> int:
    """Return the bytes of tensors that are small enough, by the user's DeepSpeed file, to stay gathered."""
    rest, embedding, blocks, head = _units(base, shards, gathering)
    return sum(tensor.nbytes for unit in (rest, embedding, *blocks, head) for tensor in unit if tensor.stays)


def _units(base: BaseSizes, shards: int, gathering: Gathering) -> tuple[_Unit, _Unit, list[_Unit], _Unit]:
    """Return last norm, embedding, layers and LM head, in the order that decides which tensors stay gathered."""
    together = 0

    def unit(tensors: Sequence[BaseTensor]) -> _Unit:
        nonlocal together
        unit_tensors = []
        for tensor in (each for each in tensors if not each.divided):
            nbytes, most = tensor.whole(shards), gathering.model_persistence_threshold
            numel = nbytes // tensor.compute_itemsize
            stays = numel <= gathering.param_persistence_threshold and (most is None or together + numel <= most)
            together += numel if stays else 0
            unit_tensors.append(_Tensor(numel, nbytes, stays))
        return tuple(unit_tensors)

    rest, embedding = unit(base.rest), unit(base.embedding)
    return rest, embedding, [unit(base.kinds[kind]) for kind in base.kind_of_layer], unit(base.head)


@functools.lru_cache(maxsize=64)
def coordinated(base: BaseSizes, shards: int, gathering: Gathering, *, is_gpu: bool) -> Gathered:
    """Return the gathered bytes by part of a step from the second on, without tensors that stay gathered.

    The coordinator's rules are followed step by step. Two layers would be a bound for dense models; where a layer has
    more elements than the embedding, buffers hold parts of two units, and that misses 7 % of DeepSeek-V3 on eight GPUs.
    """
    rest, embedding, blocks, head = _units(base, shards, gathering)
    tensors: list[_Tensor] = []

    def numbered(unit: _Unit) -> list[int]:
        tensors.extend(unit)
        return list(range(len(tensors) - len(unit), len(tensors)))

    first = numbered(embedding)
    last = numbered(head) or first
    layers = [numbered(block) for block in blocks]
    norm, unit = numbered(rest), max(map(_numel, blocks))
    bucket, most = gathering.prefetch_bucket_size, gathering.max_live_parameters
    coordinator = _Coordinator(
        units=[norm, first, *layers, last, *reversed(layers)],
        tensors=tensors,
        bucket=unit if bucket is None else bucket,
        most=unit + max(unit, _numel(embedding), _numel(head)) if most is None else most,
        reuse=gathering.max_reuse_distance,
        one_by_one=gathering.allgather_sequential,
    )
    copied = coordinator.fetch()

    def use(unit: Sequence[int]) -> int:
        """Return the bytes while the unit runs."""
        nonlocal copied
        copied = max(copied, coordinator.fetch())
        nbytes = coordinator.nbytes
        coordinator.release(unit)
        return nbytes

    # Rows from the host are copied for the gather that is on its way.
    rows = unit_bytes(base.block, shards) // shards if is_gpu and gathering.offload else 0
    at_embedding = use(first)
    *forward, at_last = [use(layer) for layer in layers]
    at_head = use(last)
    behind_head = coordinator.nbytes
    *backward, end = [use(layer) for layer in reversed(layers)]
    return Gathered(
        embedding=rows + at_embedding,
        copying=rows + copied,
        forward=rows + max(forward, default=0),
        last=rows + at_last,
        head=rows + at_head,
        head_backward=rows + behind_head,
        block=rows + max(backward, default=end),
        first=rows + end,
    )


def _numel(unit: Iterable[_Tensor]) -> int:
    return sum(tensor.numel for tensor in unit)
