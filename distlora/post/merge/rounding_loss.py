"""Measure how much of an adapter's change survives the rounding of the merged weights.

With the base W, the sum M = W + dW and its stored form Q, kept = 1 - ||M - Q|| / ||dW||: 1 if all of it survives, 0 if
the error is as large as dW (as for Q = W), negative if it is larger. Weights are read in pieces; only sums are held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distlora_kernels import nf4, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Storage dtypes of a merged model."""
AGAIN = "nf4"
"""The name of quantizing the merged model again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The change of one tensor or several, as sums of squares."""

    base: float
    """||W||^2."""
    delta: float
    """||dW||^2."""
    lost: Mapping[str, float]
    """||M - Q||^2 by storage form; NF4 only for weights that would be quantized."""

    @property
    def ratio(self) -> float:
        """Return ||dW|| / ||W||."""
        return math.sqrt(self.delta / self.base) if self.base else 0.0

    @property
    def kept(self) -> dict[str, float]:
        """Return the kept share by form; without forms that overflow, empty if nothing was added."""
        if not self.delta:
            return {}
        finite = {name: lost for name, lost in self.lost.items() if math.isfinite(lost)}
        return {name: 1 - math.sqrt(lost / self.delta) for name, lost in finite.items()}

    def as_json(self) -> dict[str, object]:
        """Return the change for merge.json."""
        return {"ratio": self.ratio, "kept": self.kept, "base_norm": math.sqrt(self.base)}


def sum_of(changes: list[Change]) -> Change:
    """Return the change of several tensors together."""
    forms = {name for change in changes for name in change.lost}
    return Change(
        base=sum(change.base for change in changes),
        delta=sum(change.delta for change in changes),
        # Leave out a form that does not cover all tensors.
        lost={
            name: sum(change.lost[name] for change in changes)
            for name in sorted(forms)
            if all(name in change.lost for change in changes)
        },
    )


@dataclass(slots=True)
class Measure:
    """Accumulates the change of one tensor over its pieces in flat order."""

    numel: int
    quantized: bool = field(kw_only=True)
    """True if the weight would be quantized to NF4 again."""
    _base: float = 0.0
    _delta: float = 0.0
    _lost: dict[str, float] = field(default_factory=lambda: {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0})
    _again: Nf4Again = field(init=False)

    def __post_init__(self) -> None:
        self._again = Nf4Again(self.numel)

    @torch.no_grad()
    def add(self, base: Tensor, merged: Tensor) -> None:
        """Add a chunk of the base and of the merged weights."""
        self._base += _square(base)
        self._delta += _square(merged - base)
        for name in ("bf16", "fp16"):
            self._lost[name] += _square(merged - merged.to(DTYPES[name]))
        if self.quantized:
            self._again.add(merged)

    def result(self) -> Change:
        """Return the change over all chunks."""
        lost = self._lost | ({AGAIN: self._again.lost()} if self.quantized else {})
        return Change(base=self._base, delta=self._delta, lost=lost)


class Nf4Again:
    """Accumulates ||M - NF4(M)||^2 in one pass.

    The codes follow from a block's absmax alone; the second quantization level, which needs the mean over all blocks,
    only scales a block's levels. With a block's absmax a, its double-quantized value a', levels l and r = M - l a:

    sum (M - l a')^2 = sum r^2 - 2 (a' - a) sum r l + (a' - a)^2 sum l^2

    Memory holds an absmax and three sums per 64 weights.
    """

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._rest = torch.empty(0)
        self._absmax: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, merged: Tensor) -> None:
        """Quantize the whole groups of a chunk, in flat order; keep the rest for the next call."""
        self._rest = torch.cat([self._rest, merged.reshape(-1)])
        whole = len(self._rest) // nf4.GROUP * nf4.GROUP
        if whole:
            self._take(self._rest[:whole])
            self._rest = self._rest[whole:].clone()

    def lost(self) -> float:
        """Return ||M - NF4(M)||^2."""
        if len(self._rest):
            self._take(self._rest)
        absmax, sums = torch.cat(self._absmax), torch.cat(self._sums, dim=1).double()
        num_blocks = -(-self._numel // nf4.BLOCK)
        mean = nf4.absmax_offset(nf4.absmax_group_sums(absmax), num_blocks)
        offset = torch.tensor(mean, dtype=torch.float32)
        stored = nf4.quantize_absmax(absmax, offset, num_blocks)
        change = (reference.dequantize_absmax(*stored, offset) - absmax).double().view(-1)
        change[num_blocks:] = 0.0
        squares, crossed, levels = sums
        return float((squares - 2 * change * crossed + change.square() * levels).sum())

    def _take(self, flat: Tensor) -> None:
        codes, absmax = nf4.quantize_blocks(flat)
        size = (len(codes) * nf4.GROUP,)
        padded = flat if len(flat) == size[0] else torch.cat([flat, flat.new_zeros(size[0] - len(flat))])
        levels = nf4.dequantize_blocks(codes, torch.ones_like(absmax), shape=size, dtype=torch.float32)
        levels = levels.view(-1, nf4.BLOCK)
        rest = torch.addcmul(padded.view(-1, nf4.BLOCK), levels, absmax.view(-1, 1), value=-1)
        self._absmax.append(absmax)
        self._sums.append(torch.stack([(rest * rest).sum(1), (rest * levels).sum(1), (levels * levels).sum(1)]))


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
