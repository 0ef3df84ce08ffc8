"""Calculate the trained parameters of a rank, their gradients and optimizer states. Imports no torch.

Adapters and trained rows of tokens are fp32 and replicated, and their gradients are flat buffers of as many numbers
(`distlora.parallel.gradients`). Trained parameters of the base are sharded over the ranks. A rank holds its
rows of their gradients from a unit's backward to the first backward of the next step; without sharding they are flat
buffers too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from distlora.architecture.shapes import ModelShapes
from distlora.architecture.tokens import EMBEDDING
from distlora.planner import traffic
from distlora.planner.memory.base import Base
from distlora.planner.workload import Workload

IN_8_BITS_FROM = 4096
"""Elements from which a state of bitsandbytes' 8-bit optimizers is in 8 bits (Optimizer2State: min_8bit_size)."""
BLOCK = 256
"""Elements of an 8-bit state that share one fp32 absmax."""
LEVELS_BYTES = 2 * 256 * 4
"""Bytes of the fp32 tables of 8-bit levels for both states, which all parameters share."""
PAGED_FROM = 100_000
"""Elements from which a paged state is in CUDA's managed memory, which is on the GPU while there is room for it
(Optimizer8bit.get_state_buffer). Nothing is paged on the CPU."""

UPDATE_BYTES: Mapping[str, int] = {"adamw": 28, "paged_adamw": 28, "adamw_8bit": 16, "paged_adamw_8bit": 16}
"""Bytes that an update moves per trained element: it and two states (4 bytes or 1 each) are read and written, its
gradient is read."""


def is_in_8_bits(optimizer: str, numel: int) -> bool:
    """Return True if the optimizer states of a parameter are in 8 bits, by optim.name."""
    return optimizer.endswith("8bit") and numel >= IN_8_BITS_FROM


def absmaxes(numel: int) -> int:
    """Return the number of absmax values of one 8-bit optimizer state."""
    return -(-numel // BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The trained parameters of a run on a rank: number of tensors by number of elements."""

    adapters: Mapping[int, int]
    """A, B and magnitudes, and trained rows of tokens."""
    of_base: Mapping[int, int]
    """Trained parameters of the base: this rank's rows."""
    is_cut: bool
    """True if the trained parameters of the base are sharded."""
    embeds: bool
    """True if the embedding, or rows of it, is trained."""
    beside: int
    """Elements beside the trained parameters: DoRA's squared row norms of frozen weights, and DPO's copy of the initial
    adapters."""
    optimizers: int = 1
    """Number of optimizers: one per trial."""

    @classmethod
    def of(cls, work: Workload, shapes: ModelShapes, base: Base, shards: int) -> Trained:
        """Build from the adapters and the base of a workload."""
        beside = 0
        adapters: Counter[int] = Counter()
        for adapter in work.adapters if work.adapter.method != "full" else ():
            for each, count in shapes.alike(adapter):
                for numel in each.numels:
                    adapters[numel] += count
            if work.objective == "dpo" and not adapter.starts_as_base:
                beside += _numbers(adapters)
        if work.adapter.use_dora:  # Of each adapted weight, whichever trials adapt it.
            blocks = (block for adapter in work.adapters for block in shapes.adapters(adapter))
            beside += sum({each.path: each.magnitude for block in blocks for each in block}.values())
        rows = traffic.trained_rows(work, shapes)
        adapters.update(len(ids) * shapes.hidden for ids in rows.values())
        of_base: Counter[int] = Counter()
        for tensor, count in base.counted():
            if tensor.trained:
                of_base[tensor.own(shards)] += count
        embeds = EMBEDDING in rows or any(tensor.trained for tensor in base.embedding)
        return cls(
            adapters=adapters,
            of_base=of_base,
            is_cut=shards > 1,
            embeds=embeds,
            beside=beside,
            optimizers=len(work.adapters),
        )

    @property
    def adapter_bytes(self) -> int:
        """Bytes of replicated trained parameters, all in fp32."""
        return 4 * (_numbers(self.adapters) + self.beside)

    @property
    def flat_gradient_bytes(self) -> int:
        """Bytes of gradient buffers that exist from start to end."""
        return 4 * (_numbers(self.adapters) + (0 if self.is_cut else _numbers(self.of_base)))

    @property
    def cut_gradient_bytes(self) -> int:
        """Bytes of this rank's rows of sharded gradients after all reductions."""
        return 4 * _numbers(self.of_base) if self.is_cut else 0

    def optimizer_bytes(self, name: str, *, is_gpu: bool) -> int:
        """Return the bytes of optimizer states that stay on the device; paged ones do not."""
        sizes = Counter(self.adapters) + Counter(self.of_base)
        if name == "adamw":  # Two moments, and a step count in fp32.
            return sum((8 * numel + 4) * count for numel, count in sizes.items())
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
