"""What goes into the linear of a mixture of experts: where its rows belong, its frozen weight, its adapter.

Letters: T tokens, K experts that a token chooses, S = K T rows, E experts, I in features, O out features, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels.operands import FrozenWeight


class Routing(NamedTuple):
    """Where the tokens of a batch go: one row for each expert that a token chooses, sorted by expert."""

    num_tokens: int
    tokens: Tensor
    """(S,) int64: the token of each row. An expert's rows are in the order of the tokens' choices, then of the tokens,
    as transformers' eager experts have them."""
    order: Tensor
    """(S,) int64: which (choice, token) each row is: choice * T + token."""
    inverse: Tensor
    """(S,) int64: the row of each (choice, token)."""
    experts: Tensor
    """(S,) int64: the expert of each row."""
    ends: Tensor
    """(E,) int32: where the rows of each expert end."""
    bounds: tuple[int, ...] | None
    """(E + 1): the same on the host, from 0 on; None where reading them would make the host wait for a GPU."""

    @classmethod
    def of(cls, choices: Tensor, num_experts: int, *, on_host: bool) -> Routing:
        """From `choices` (T, K) int64, the experts that each token chooses."""
        flat = choices.T.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
        ends = counts.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0)
        return cls(
            num_tokens=choices.shape[0],
            tokens=order % choices.shape[0],
            order=order,
            inverse=torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)),
            experts=flat[order],
            ends=ends.int(),
            bounds=(0, *ends.tolist()) if on_host else None,
        )

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) of the experts that have rows."""
        assert self.bounds is not None, "the bounds are on the device alone"
        for expert, (start, stop) in enumerate(itertools.pairwise(self.bounds)):
            if start < stop:
                yield expert, slice(start, stop)


class ExpertAdapter(NamedTuple):
    """What an expert linear adds: a (E, R, I) and b (E, O, R) of every expert, and their scale."""

    a: Tensor
    b: Tensor
    gate: float | Tensor
    """s, or (S, R) fp32: s where the row uses the column's adapter, 0 elsewhere."""

    def gate_of(self, rows: slice) -> float | Tensor:
        return self.gate[rows] if isinstance(self.gate, Tensor) else self.gate


class ExpertLinear(NamedTuple):
    """The linears of all experts: one fused weight (E, O, I), or (E, I, O) if `transposed`."""

    weight: FrozenWeight
    transposed: bool
    adapter: ExpertAdapter | None
    bias: Tensor | None
    """(E, O), which gets no gradient."""

    @property
    def out_features(self) -> int:
        return self.weight.shape[2 if self.transposed else 1]


class ExpertGradients(NamedTuple):
    """None where a gradient is not asked for."""

    x: Tensor | None
    a: Tensor | None
    b: Tensor | None
