"""List the base's tensors: how each is stored, what a rank keeps of it, and its size while gathered. Imports no torch.

`model.frozen_linear.FrozenTensor` says what a packed weight consists of, `model.build.build_model` what is
trained and in which dtype. Both backends cut dim 0 into ceil(rows / ranks) rows for each rank
(`distlora.planner.traffic.padded`); FSDP2 fills up the last ranks' in its first forward
(`FSDPParam.reset_sharded_param`), so every rank has as much as the first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distlora.architecture.shapes import ModelShapes, Weight
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.planner import traffic
from distlora.planner.memory import Kind
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Stored:
    """One parameter of the base."""

    kind: Kind
    shape: tuple[int, ...]
    itemsize: int
    """Of what a rank keeps."""
    compute_itemsize: int
    """Of what is gathered: a trained one is kept in fp32 and gathered in the run's dtype."""
    trained: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def own(self, shards: int) -> int:
        """Numbers in a rank's rows."""
        return traffic.padded(self.shape, shards) // shards

    def kept(self, shards: int) -> int:
        """Bytes of a rank's rows."""
        return self.itemsize * self.own(shards)

    def whole(self, shards: int) -> int:
        """Bytes while it is gathered, filled up to a multiple of the ranks."""
        return self.compute_itemsize * traffic.padded(self.shape, shards)


@dataclass(frozen=True, slots=True)
class Base:
    """A decoder's parameters by unit: what is gathered together."""

    embedding: tuple[Stored, ...]
    """Of a tied model, the head's too."""
    block: tuple[Stored, ...]
    layers: int
    head: tuple[Stored, ...]
    """Empty where it is the embedding's."""
    rest: tuple[Stored, ...]
    """The last norm."""
    offsets: int
    """Packed weights of a block with an offset, a replicated number in fp32."""
    instead: tuple[tuple[Stored, int], ...] = ()
    """Of a checkpoint that has left some weights dense in some blocks, where `block` has what the largest has: (a
    tensor, how many of it there are beside those of `layers` such blocks; below 0, how many of those there are not)."""

    @property
    def tied(self) -> bool:
        """True if embedding and LM head are one matrix."""
        return not self.head

    def counted(self) -> Iterator[tuple[Stored, int]]:
        """Yield (tensor, number of tensors like it)."""
        for unit, count in ((self.embedding, 1), (self.block, self.layers), (self.head, 1), (self.rest, 1)):
            for tensor in unit:
                yield tensor, count
        yield from self.instead

    def kept(self, shards: int) -> Counter[Kind]:
        """Bytes of a rank by kind, offsets among the scales."""
        found: Counter[Kind] = Counter()
        for tensor, count in self.counted():
            found[tensor.kind] += tensor.kept(shards) * count
        found["scales"] += 4 * self.offsets * self.layers
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Bytes at the most in each part of a step."""

    copying: int = 0
    """While a unit is copied out of what it came in, when no other one runs."""
    embedding: int = 0
    forward: int = 0
    """While a block runs that has another behind it, and"""
    last: int = 0
    """while the last block runs."""
    head: int = 0
    head_backward: int = 0
    block: int = 0
    """While a block is in its backward that has another before it, and"""
    first: int = 0
    """while the first one is."""


def unit_bytes(unit: Iterable[Stored], shards: int) -> int:
    """Return the bytes of a unit while it is gathered."""
    return sum(tensor.whole(shards) for tensor in unit)


def planned_base(work: Workload, model: PlannedModel) -> Base:
    """Return the base as this run keeps it."""
    return base_of(work, model.shapes, plain_absmax=model.plain_absmax, left_dense=model.left_dense)


def base_of(
    work: Workload, shapes: ModelShapes, *, plain_absmax: bool = False, left_dense: Mapping[str, int] | None = None
) -> Base:
    """Return the base as a run keeps it.

    For a checkpoint quantized before: `plain_absmax` if it has no double quantization; `left_dense` the number of
    layers in which a weight is not quantized.
    """
    itemsize = traffic.DTYPE_BYTES[work.dtype]
    adapter, full = work.adapter, work.adapter.method == "full"
    packs = work.quantized
    tied = shapes.ties(adapter)

    def dense(kind: Kind, shape: Sequence[int], *, trained: bool) -> Stored:
        return Stored(kind, tuple(shape), 4 if trained else itemsize, itemsize, trained)

    def matrix(name: str) -> Stored:
        shape = (shapes.vocabulary, shapes.hidden)
        return dense("embeddings", shape, trained=full or name in adapter.modules_to_save)

    def of_block(weight: Weight) -> list[Stored]:
        if not weight.packs:
            return [dense("norms", weight.shape, trained=full)]
        if not packs:
            return [dense("weights", weight.shape, trained=full)]
        if weight.path in unpacked:
            return [dense("weights", weight.shape, trained=False)]
        return of_packed(weight)

    def of_packed(weight: Weight) -> list[Stored]:
        groups = -(-weight.numel // traffic.GROUP_WEIGHTS)
        codes = Stored("codes", (groups, traffic.GROUP_CODES), 1, 1)
        if plain_absmax:
            return [codes, Stored("scales", (groups, traffic.GROUP_SCALES), 4, 4)]
        return [codes, Stored("scales", (groups, traffic.GROUP_SCALES), 1, 1), Stored("scales", (groups,), 4, 4)]

    unpacked = (left_dense or {}) if packs else {}
    instead: list[tuple[Stored, int]] = []
    for weight in shapes.block:
        count = shapes.num_layers - unpacked.get(weight.path, shapes.num_layers)
        if count:
            offset = [] if plain_absmax else [Stored("scales", (1,), 4, 4)]
            instead += [(tensor, -count) for tensor in of_block(weight)]
            instead += [(tensor, count) for tensor in (*of_packed(weight), *offset)]
    offsets = [weight for weight in shapes.block if weight.packs and weight.path not in unpacked]
    return Base(
        embedding=(matrix(EMBEDDING),),
        block=tuple(tensor for weight in shapes.block for tensor in of_block(weight)),
        layers=shapes.num_layers,
        head=() if tied else (matrix(HEAD),),
        rest=(dense("norms", (shapes.hidden,), trained=full),),
        offsets=len(offsets) if packs and not plain_absmax else 0,
        instead=tuple(instead),
    )
