"""What is trained, as a rank keeps it: parameters, their gradients, the optimizer's states. Imports no torch.

Adapters and trained rows of tokens are fp32 and replicated, and their gradients are flat buffers of as many numbers
(`distlora.parallel.adapter_sync`). What is trained of the base is cut over the ranks like it, and has this rank's rows
of its gradient from a unit's backward to the next step's first (`distlora.parallel.trained_shards`); where nothing is
cut, flat buffers too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distlora import wire
from distlora.config import Config
from distlora.plan.base import Base
from distlora.shapes import Adapter, ModelShapes

_FLOATS_BELOW = 4096
"""Elements from which on a moment of bitsandbytes' 8-bit optimizers is in 8 bits (Optimizer2State: min_8bit_size)."""
_BLOCK = 256
"""Elements of such a moment with an absmax in fp32 of their own."""
_PAGED_FROM = 100_000
"""Elements from which on a paged moment is CUDA's managed memory, which is on the card while there is room for it
(Optimizer8bit.get_state_buffer); on the CPU nothing is paged."""
_LEVELS = 2 * 256 * 4
"""Bytes of the levels of 8 bits for both moments, fp32, which all parameters share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The trained parameters of a run, by their numbers of elements on a rank."""

    adapters: tuple[int, ...]
    """A, B and magnitudes, and before them trained rows of tokens."""
    of_base: tuple[int, ...]
    """What is trained of the base: this rank's rows."""
    is_cut: bool
    """Whether those are cut over ranks."""
    row_norms: int
    """Numbers that DoRA keeps beside what it trains: the squared norms of the frozen weights' rows."""
    started: int
    """Numbers of the adapters as they began, where DPO compares with them."""

    @classmethod
    def of(cls, config: Config, shapes: ModelShapes, base: Base, shards: int) -> Trained:
        full = config.adapter.method == "full"
        adapters = [] if full else [each for block in shapes.adapters(config.adapter) for each in block]
        numels = [numel for each in adapters for numel in _numels(each)]
        rows = [len(ids) * shapes.hidden for ids in wire.trained_rows(config, shapes).values()]
        keeps_start = config.train.objective == "dpo" and not config.adapter.starts_as_base
        return cls(
            adapters=(*rows, *numels),
            of_base=tuple(tensor.kept(shards) // tensor.itemsize for tensor in base.trained()),
            is_cut=shards > 1,
            row_norms=sum(each.magnitude for each in adapters),
            started=sum(numels) if keeps_start else 0,
        )

    @property
    def adapter_bytes(self) -> int:
        """Of what is replicated beside the base, all in fp32."""
        return 4 * (sum(self.adapters) + self.row_norms + self.started)

    @property
    def flat_gradient_bytes(self) -> int:
        """Of gradients that have their place from the start to the end."""
        return 4 * (sum(self.adapters) + (0 if self.is_cut else sum(self.of_base)))

    @property
    def cut_gradient_bytes(self) -> int:
        """Of this rank's rows of gradients, once they have all been summed."""
        return 4 * sum(self.of_base) if self.is_cut else 0

    def optimizer_bytes(self, name: str, *, is_gpu: bool) -> int:
        """Of all states that stay on the device: paged ones do not."""
        numels = (*self.adapters, *self.of_base)
        if name == "adamw":  # Two moments, and a step count in fp32.
            return sum(8 * numel + 4 for numel in numels)
        in_8_bits, pages = name.endswith("8bit"), name.startswith("paged") and is_gpu
        levels = _LEVELS if in_8_bits and any(numel >= _FLOATS_BELOW for numel in numels) else 0
        return levels + sum(_moments(numel, in_8_bits=in_8_bits, pages=pages) for numel in numels)


def _numels(adapter: Adapter) -> Iterable[int]:
    """Of A, B and the magnitude, a parameter each."""
    down, up = adapter.down, adapter.up
    return (down[0] * down[1], up[0] * up[1], *([adapter.magnitude] if adapter.magnitude else []))


def _moments(numel: int, *, in_8_bits: bool, pages: bool) -> int:
    """Bytes of both moments of one parameter on the device."""
    paged = pages and numel >= _PAGED_FROM
    if in_8_bits and numel >= _FLOATS_BELOW:
        return (0 if paged else 2 * numel) + 2 * 4 * -(-numel // _BLOCK)
    return 0 if paged else 8 * numel
