"""What goes into an adapted linear: its frozen weight, its adapter, and which rows use which adapter.

Letters: B rows of the batch, M rows of the flattened input (B x tokens), I in features, O out features, N adapters of a
linear, R their ranks added up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distlora_kernels.dropout import ChosenDropout, Dropout
from distlora_kernels.nf4 import dequantize_blocks, nf4_dequantize


class FrozenWeight(NamedTuple):
    """A weight (O, I), or one of all experts (E, O, I), that gets no gradient.

    `parts` is (weight,), NF4's (codes, scales, group_scale, offset), or (codes, absmax) without double quantization.
    """

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]

    @property
    def packed(self) -> bool:
        return len(self.parts) > 1

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The whole weight in `dtype`; a packed weight is written to `out` if that is given."""
        if len(self.parts) == 1:
            return self.parts[0].to(dtype)
        if len(self.parts) == 2:
            return dequantize_blocks(*self.parts, shape=self.shape, dtype=dtype, out=out)
        codes, scales, group_scale, offset = self.parts
        return nf4_dequantize(codes, scales, group_scale, offset, shape=self.shape, dtype=dtype, out=out)


@functools.lru_cache(maxsize=1024)
def per_column(values: tuple[float, ...], ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number of each adapter -> (R,), that of each column; copied to the device once and kept."""
    columns = [value for value, rank in zip(values, ranks, strict=True) for _ in range(rank)]
    return torch.tensor(columns, dtype=dtype, device=device)


def columns_of(adapter: int, ranks: Sequence[int]) -> slice:
    """Where one of several adapters lies that are side by side: in the columns of b, and the rows of a."""
    first = sum(ranks[:adapter])
    return slice(first, first + ranks[adapter])


class RowChoice(NamedTuple):
    """Which adapter each row of the batch uses, of several that lie side by side: columns of b, rows of a."""

    rows: Tensor
    """(B,) int64: the adapter's number, -1 for none."""
    scales: tuple[float, ...]
    """The scale s of each adapter."""
    ranks: tuple[int, ...]
    """The rank of each adapter."""

    def columns(self, adapter: int) -> slice:
        return columns_of(adapter, self.ranks)


class Magnitude(NamedTuple):
    """What DoRA gives the rows of W + s b a for a norm (dora_linear.py)."""

    masters: Tensor
    """(N, O) fp32: of each adapter; N = 1 without a choice."""
    row_norms_squared: Tensor
    """(O,) fp32: of the rows of the frozen weight, as the GEMMs see it."""


class Adapter(NamedTuple):
    """What a linear adds: a (R, I) and b (O, R), fp32 masters, their scale s, the inputs that they do not see, and with
    DoRA the magnitude."""

    a: Tensor
    b: Tensor
    scale: float | RowChoice
    dropout: Dropout | ChosenDropout | None = None
    """A `ChosenDropout` has one for each adapter of a choice."""
    magnitude: Magnitude | None = None


class Linear(NamedTuple):
    """One of the linears that are applied to an input."""

    weight: FrozenWeight
    adapter: Adapter | None = None
    bias: Tensor | None = None
    """(O,), which gets no gradient."""


class KeptOfMagnitude(NamedTuple):
    """What the backward of a linear with a magnitude reads of its forward (dora_linear.py makes it and reads it).

    dm is the sum over the rows of dy * output, divided by `divisor`: the output is v and the divisor n, or k v and m.
    """

    output: Tensor | None
    """(M, O); None where it takes a pass to get and no backward comes."""
    divisor: Tensor
    """(N, O) fp32."""
    excess: Tensor | None
    """k - 1 as (O,), or (B, O) where rows choose, in x's dtype."""
    factor: Tensor | None = None
    """Where k is folded into the packed weight and B: k as (O,) fp32, in the place of `excess`."""


class Kept(NamedTuple):
    """What a linear's backward reads of its forward."""

    xa: Tensor | None = None
    """x A^T, None without an adapter."""
    magnitude: KeptOfMagnitude | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """NUM_KEPT of them, for autograd to save."""
        return (self.xa, *((None,) * (NUM_KEPT - 1) if self.magnitude is None else self.magnitude))

    @staticmethod
    def of(tensors: Sequence[Any]) -> Kept:
        xa, output, divisor, excess, factor = tensors
        return Kept(xa, None if divisor is None else KeptOfMagnitude(output, divisor, excess, factor))


NUM_KEPT = 1 + len(KeptOfMagnitude._fields)


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    a: tuple[bool, ...]
    """Of each linear's adapter."""
    b: tuple[bool, ...]
    magnitude: tuple[bool, ...]


@dataclass(slots=True)
class Gradients:
    """The gradients of the linears of one input; None where none is asked for or none comes in."""

    num_linears: int
    x: Tensor | None = None
    """(M, I) in x's dtype."""
    a: list[Tensor | None] = field(init=False)
    """Of each linear, in its masters' dtype."""
    b: list[Tensor | None] = field(init=False)
    magnitude: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        count = self.num_linears
        self.a, self.b, self.magnitude = [None] * count, [None] * count, [None] * count
