"""List the base's tensors and a rank's trained parameters, gradients and optimizer states. Imports no torch.

`model.frozen_linear.FrozenTensor` has the tensors of a packed weight, `model.build.build_model` what is trained and in
which dtype. Both backends shard dim 0 into ceil(rows / ranks) rows per rank (`padded`); FSDP2 pads the last
ranks' in its first forward, so every rank has as much as the first. Adapters and trained token rows are fp32 and
replicated, with flat gradient buffers (`distlora.parallel.gradients`). Trained parameters of the base are sharded: a
rank holds its rows of their gradients from a unit's backward to the first backward of the next step.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distlora.architecture.shapes import ModelShapes, Weight
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.planner.memory import Kind
from distlora.planner.workload import Workload, padded
from distlora_kernels.format_layouts import FORMAT_LAYOUTS


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """One parameter of the base."""

    kind: Kind
    shape: tuple[int, ...]
    itemsize: int
    """Bytes per element that a rank keeps."""
    compute_itemsize: int
    """Bytes per gathered element: trained ones are kept in fp32 and gathered in the run's dtype."""
    trained: bool = False
    divided: bool = False
    """True of experts that are divided over the ranks, or gathered on demand, and not with their layer."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def shard_numel(self, shards: int) -> int:
        """Numbers in a rank's rows."""
        return padded(self.shape, shards) // shards

    def kept(self, shards: int) -> int:
        """Bytes of a rank's rows."""
        return self.itemsize * self.shard_numel(shards)

    def whole(self, shards: int) -> int:
        """Bytes while it is gathered with its unit; none if it is divided."""
        return 0 if self.divided else self.gathered(shards)

    def gathered(self, shards: int) -> int:
        """Bytes while it is gathered, filled up to a multiple of the ranks."""
        return self.compute_itemsize * padded(self.shape, shards)


@dataclass(frozen=True, slots=True)
class BaseSizes:
    """A decoder's parameters by unit: what is gathered together."""

    embedding: tuple[BaseTensor, ...]
    """Embedding; of a tied model, the LM head too."""
    kinds: tuple[tuple[BaseTensor, ...], ...]
    """Tensors of each kind of decoder layer."""
    kind_of_layer: tuple[int, ...]
    head: tuple[BaseTensor, ...]
    """Empty where it is the embedding's, and of a model with a score in its place."""
    tied: bool
    """True if embedding and LM head are one matrix."""
    rest: tuple[BaseTensor, ...]
    """The decoder's tensors outside of its layers: the last norm."""
    replicated: int
    """Bytes of the replicated parts of quantized weights."""
    apart: tuple[tuple[BaseTensor, ...], ...] = ()
    """Tensors of each fused weight of the layer whose experts are largest, if they are gathered apart."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.kind_of_layer)

    @property
    def block(self) -> tuple[BaseTensor, ...]:
        """The largest decoder layer while it is gathered."""
        return max(self.kinds, key=lambda kind: unit_bytes(kind, 1))

    def total(self, measure: Callable[[tuple[BaseTensor, ...]], int], begin: int = 0, end: int | None = None) -> int:
        """Return the sum of a measure of the layers from `begin` to before `end`."""
        by_kind = [measure(kind) for kind in self.kinds]
        return sum(by_kind[kind] for kind in self.kind_of_layer[begin:end])

    def counted(self) -> Iterator[tuple[BaseTensor, int]]:
        """Yield (tensor, number of tensors like it)."""
        layers = ((kind, self.kind_of_layer.count(number)) for number, kind in enumerate(self.kinds))
        for unit, count in ((self.embedding, 1), *layers, (self.head, 1), (self.rest, 1)):
            for tensor in unit:
                yield tensor, count

    def kept(self, shards: int) -> Counter[Kind]:
        """Bytes of a rank by kind, replicated parts among the scales."""
        nbytes: Counter[Kind] = Counter()
        for tensor, count in self.counted():
            nbytes[tensor.kind] += tensor.kept(shards) * count
        nbytes["scales"] += self.replicated
        return nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Bytes at the most in each part of a step."""

    copying: int = 0
    """Bytes while a unit is copied out of its buffer and no other one runs."""
    embedding: int = 0
    forward: int = 0
    """Bytes while a layer before the last one runs."""
    last: int = 0
    """Bytes while the last layer runs."""
    head: int = 0
    head_backward: int = 0
    block: int = 0
    """Bytes in the backward of a layer after the first one."""
    first: int = 0
    """Bytes in the backward of the first layer."""


def unit_bytes(unit: Iterable[BaseTensor], shards: int) -> int:
    """Return the bytes of a unit while it is gathered."""
    return sum(tensor.whole(shards) for tensor in unit)


def base_of(work: Workload, shapes: ModelShapes) -> BaseSizes:
    """Return the base as a run keeps it."""
    itemsize = work.itemsize
    adapter, full = work.adapter, work.adapter.method == "full"
    tied, scores = shapes.ties(adapter), work.train.needs.labels > 0

    def dense(kind: Kind, shape: Sequence[int], *, trained: bool, divided: bool = False) -> BaseTensor:
        return BaseTensor(kind, tuple(shape), 4 if trained else itemsize, itemsize, trained, divided)

    def packed(shape: Sequence[int], format: str, kinds: tuple[Kind, Kind], *, divided: bool) -> tuple[BaseTensor, ...]:
        sizes = FORMAT_LAYOUTS[format]
        groups = sizes.num_groups(shape)
        return tuple(
            BaseTensor(kinds[index > 0], (groups, *part.shape), part.itemsize, part.itemsize, divided=divided)
            for index, part in enumerate(sizes.parts)
        )

    def matrix(name: str, format: str | None) -> tuple[BaseTensor, ...]:
        shape = (shapes.vocabulary, shapes.hidden)
        if format is not None:
            return packed(shape, format, ("embeddings", "embeddings"), divided=False)
        return (dense("embeddings", shape, trained=full or name in adapter.modules_to_save),)

    def of_block(weight: Weight, format: str | None) -> tuple[BaseTensor, ...]:
        divided = weight.kind == "experts" and work.has_experts_apart
        if format is None:
            return (dense("weights" if weight.packs else "norms", weight.shape, trained=full, divided=divided),)
        return packed(weight.shape, format, ("codes", "scales"), divided=divided)

    architecture, layers = shapes.architecture, shapes.layer_formats(work.format)
    kinds = list(dict.fromkeys(layers))
    weights = [
        [of_block(*each) for each in zip(architecture.kinds[kind].weights, formats, strict=True)]
        for kind, formats in kinds
    ]
    tensors = tuple(tuple(itertools.chain(*layer)) for layer in weights)
    experts = [tuple(weight for weight in layer if weight[0].divided) for layer in weights]
    outside = (
        dense("embeddings" if len(w.shape) > 1 else "norms", w.shape, trained=full) for w in architecture.outside
    )
    tokens = work.token_formats(shapes)
    return BaseSizes(
        embedding=matrix(EMBEDDING, tokens[0]),
        kinds=tensors,
        kind_of_layer=tuple(map(kinds.index, layers)),
        head=() if tied or scores else matrix(HEAD, tokens[1]),
        tied=tied and not scores,
        rest=tuple(outside),
        apart=max(experts, key=lambda each: sum(tensor.numel for weight in each for tensor in weight)),
        replicated=sum(
            count * FORMAT_LAYOUTS[kept].replicated_bytes
            for (_, formats), count in Counter(layers).items()
            for kept in formats
            if kept
        ),
    )


IN_8_BITS_FROM = 4096
"""Elements from which a state of bitsandbytes' 8-bit optimizers is in 8 bits (Optimizer2State: min_8bit_size)."""
BLOCK = 256
"""Elements of an 8-bit state that share one fp32 absmax."""
LEVELS_BYTES = 2 * 256 * 4
"""Bytes of the fp32 tables of 8-bit levels for both states, which all parameters share."""
PAGED_FROM = 100_000
"""Elements from which a paged state is in CUDA's managed memory, which is on the GPU while there is room for it
(Optimizer8bit.get_state_buffer). Nothing is paged on the CPU."""

UPDATE_BYTES: Mapping[str, int] = {
    "adamw": 28,
    "paged_adamw": 28,
    "adamw_8bit": 16,
    "paged_adamw_8bit": 16,
    "muon": 104,
}
"""Bytes that an update moves per trained element: it and two states (4 bytes or 1 each) are read and written, its
gradient is read. Muon: one state, five products of the update in 16 bits, which are read twice and written, and copies
of the matrix and its state, made and put back."""
MUON_BYTES = 2 * 4 + 4 + 3 * 2
"""Bytes per element of a matrix that Muon updates: its and its state's copy in fp32, the update in fp32, and in 16 bits
the update's copy, a product and a sum."""


def is_in_8_bits(optimizer: str, numel: int) -> bool:
    """Return True if the optimizer states of a parameter are in 8 bits, by optim.name."""
    return optimizer.endswith("8bit") and numel >= IN_8_BITS_FROM


def absmaxes(numel: int) -> int:
    """Return the number of absmax values of one 8-bit optimizer state."""
    return -(-numel // BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedSizes:
    """The trained parameters of a run on a rank: number of tensors by number of elements."""

    adapters: Mapping[int, int]
    """A, B and magnitudes, trained rows of tokens, and a reward model's score."""
    of_base: Mapping[int, int]
    """Trained parameters of the base: this rank's rows."""
    is_sharded: bool
    """True if the trained parameters of the base are sharded."""
    embeds: bool
    """True if the embedding, or rows of it, is trained."""
    beside: int
    """Elements beside the trained parameters: DoRA's squared row norms of frozen weights, and DPO's copy of the initial
    adapters or a teacher's."""
    matrices: Mapping[int, int]
    """Those of the parameters that Muon updates: matrices inside the decoder layers."""
    optimizers: int = 1
    """Number of optimizers: one per trial."""

    @classmethod
    def of(cls, work: Workload, shapes: ModelShapes, base: BaseSizes, shards: int) -> TrainedSizes:
        """Build from the adapters and the base of a workload."""
        beside = 0
        adapters: Counter[int] = Counter()
        matrices: Counter[int] = Counter()
        for adapter in work.adapters if work.adapter.method != "full" else ():
            for each, count in shapes.alike(adapter):
                for numel in each.numels:
                    adapters[numel] += count
                if ".experts." not in each.path:
                    matrices.update({math.prod(each.down): count})
                    matrices.update({math.prod(each.up): count})
            # A teacher may have another rank, which its folder tells.
            if work.train.teacher is not None or (work.train.needs.reference and not adapter.starts_as_base):
                beside += _numbers(adapters)
        if work.adapter.use_dora:  # Of each adapted weight, whichever trials adapt it.
            blocks = (block for adapter in work.adapters for block in shapes.adapters(adapter))
            beside += sum({adapted.path: adapted.magnitude for block in blocks for adapted in block}.values())
        rows = work.trained_rows(shapes)
        adapters.update(len(ids) * shapes.hidden for ids in rows.values())
        adapters.update(map(math.prod, work.train.needs.score_shapes(shapes.hidden).values()))
        of_base: Counter[int] = Counter()
        for tensor, count in base.counted():
            if tensor.trained:
                of_base[tensor.shard_numel(shards)] += count
                if len(tensor.shape) == 2 and tensor.kind != "embeddings":
                    matrices[tensor.shard_numel(shards)] += count
        embeds = EMBEDDING in rows or any(tensor.trained for tensor in base.embedding)
        return cls(
            adapters=adapters,
            of_base=of_base,
            is_sharded=shards > 1,
            embeds=embeds,
            beside=beside,
            matrices=matrices,
            optimizers=len(work.adapters),
        )

    @property
    def adapter_bytes(self) -> int:
        """Bytes of replicated trained parameters, all in fp32."""
        return 4 * (_numbers(self.adapters) + self.beside)

    @property
    def flat_gradient_bytes(self) -> int:
        """Bytes of gradient buffers that exist from start to end."""
        return 4 * (_numbers(self.adapters) + (0 if self.is_sharded else _numbers(self.of_base)))

    @property
    def sharded_gradient_bytes(self) -> int:
        """Bytes of this rank's rows of sharded gradients after all reductions."""
        return 4 * _numbers(self.of_base) if self.is_sharded else 0

    def optimizer_bytes(self, name: str, *, is_gpu: bool) -> int:
        """Return the bytes of optimizer states that stay on the device; paged ones do not."""
        sizes = Counter(self.adapters) + Counter(self.of_base)
        if name in ("adamw", "muon"):  # Two moments and a step count in fp32, or one moment of a matrix.
            saved = 0 if name == "adamw" else sum((4 * numel + 4) * n for numel, n in self.matrices.items())
            return sum((8 * numel + 4) * count for numel, count in sizes.items()) - saved
        pages = name.startswith("paged") and is_gpu
        levels = self.optimizers * LEVELS_BYTES if any(is_in_8_bits(name, numel) for numel in sizes) else 0
        moments = (_moments(name, numel, pages=pages) * count for numel, count in sizes.items())
        return levels + sum(moments)


def _numbers(sizes: Mapping[int, int]) -> int:
    return sum(numel * count for numel, count in sizes.items())


def _moments(optimizer: str, numel: int, *, pages: bool) -> int:
    """Bytes of both moments of one parameter on the device."""
    paged = pages and numel >= PAGED_FROM
    if is_in_8_bits(optimizer, numel):
        return (0 if paged else 2 * numel) + 2 * 4 * absmaxes(numel)
    return 0 if paged else 8 * numel
