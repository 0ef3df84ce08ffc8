"""What goes into the linear of a mixture of experts: where its rows belong, its frozen weight, its adapter.

Letters: T tokens, K experts that a token chooses, S = K T rows, E experts, I in features, O out features, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels.operands import FrozenWeight, columns_of


class Users(NamedTuple):
    """Which of N adapters the rows of a Routing use: those of an expert that use the same one are neighbours."""

    number: int
    """N."""
    of_rows: Tensor
    """(S,) int64: the adapter of each row, -1 for none."""
    ends: Tensor
    """(E * (N + 1),) int32: where the rows of each adapter of each expert end; those without one come first."""
    bounds: tuple[int, ...] | None
    """(E * (N + 1) + 1): the same on the host, from 0 on, as a Routing's."""

    @classmethod
    def of(cls, key: Tensor, order: Tensor, adapters: tuple[Tensor, int], num_experts: int, *, on_host: bool) -> Users:
        """`key` says in order of (expert, adapter) what each (choice, token) uses, and `order` sorts it."""
        of_tokens, number = adapters
        counts = torch.zeros(num_experts * (number + 1), dtype=torch.int64, device=key.device)
        ends = counts.scatter_add_(0, key, torch.ones_like(key)).cumsum(0)
        return cls(
            number=number,
            of_rows=of_tokens[order % of_tokens.shape[0]],
            ends=ends.int(),
            bounds=(0, *ends.tolist()) if on_host else None,
        )

    def runs(self, expert: int) -> Iterator[tuple[int, slice]]:
        """(adapter or -1, its rows) of those that an expert has rows of."""
        assert self.bounds is not None, "the bounds are on the device alone"
        first = expert * (self.number + 1)
        for user in range(self.number + 1):
            start, stop = self.bounds[first + user : first + user + 2]
            if start < stop:
                yield user - 1, slice(start, stop)


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
    users: Users | None = None
    """Which adapter each row uses, where tokens choose."""

    @classmethod
    def of(
        cls, choices: Tensor, num_experts: int, *, on_host: bool, adapters: tuple[Tensor, int] | None = None
    ) -> Routing:
        """From `choices` (T, K) int64, the experts that each token chooses; `adapters`: (T,) int64, which of so many
        adapters each token uses, -1 for none. An expert's rows are then sorted by that before all else.
        """
        flat = choices.T.reshape(-1)
        key = flat
        if adapters is not None:
            of_tokens, number = adapters
            key = flat * (number + 1) + (of_tokens + 1).repeat(choices.shape[1])
        order = torch.argsort(key, stable=True)
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
            users=None if adapters is None else Users.of(key, order, adapters, num_experts, on_host=on_host),
        )

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) of the experts that have rows."""
        assert self.bounds is not None, "the bounds are on the device alone"
        for expert, (start, stop) in enumerate(itertools.pairwise(self.bounds)):
            if start < stop:
                yield expert, slice(start, stop)


class ExpertChoice(NamedTuple):
    """What a weight has for those who choose (`Users`): adapters side by side, rows of each a and columns of b."""

    of_users: tuple[int, ...]
    """The number of each user's adapter here; -1 for none."""
    scales: tuple[float, ...]
    ranks: tuple[int, ...]

    def columns(self, adapter: int) -> slice:
        return columns_of(adapter, self.ranks)


class ExpertAdapter(NamedTuple):
    """What an expert linear adds: a (E, R, I) and b (E, O, R) of every expert, and their scale, or who uses what."""

    a: Tensor
    b: Tensor
    scale: float | ExpertChoice

    def runs(self, routing: Routing, expert: int, rows: slice) -> Iterator[tuple[slice, slice | None, float]]:
        """Of an expert's rows, those that use the same adapter: (rows, its columns, its scale); None for none."""
        choice = self.scale
        if not isinstance(choice, ExpertChoice):
            yield rows, slice(None), choice
            return
        assert routing.users is not None
        for user, run in routing.users.runs(expert):
            number = choice.of_users[user] if user >= 0 else -1
            yield (run, None, 0.0) if number < 0 else (run, choice.columns(number), choice.scales[number])


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
