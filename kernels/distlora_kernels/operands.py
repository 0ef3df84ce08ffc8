"""Define the operands of adapted linears and of expert linears: frozen weight, adapter, choice of adapters, routing.

A weight is dequantized into memory that the next one uses again: on a GPU one buffer per device and stream. It is valid
until the next one is taken: kernels of a stream run in order, so the GEMM that reads it is done before it is
overwritten. On the CPU it is an ordinary tensor; the launcher configures malloc to keep freed pages.

Letters: B rows of the batch, M rows of the flattened input (B x tokens), I in features, O out features, N adapters of a
linear, R their total rank. Of experts: T tokens, K experts per token, S = K T rows, E experts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distlora_kernels.dispatch import uses_triton
from distlora_kernels.dropout import ChosenDropout, Dropout
from distlora_kernels.formats import Format
from distlora_kernels.formats.nf4 import Nf4, dequantize_beside


class FrozenWeight(NamedTuple):
    """A frozen weight (O, I), or the fused weight of all experts (E, O, I).

    `parts` is (weight,), or the format's parts and then its replicated ones.
    """

    parts: tuple[Tensor, ...]
    shape: tuple[int, ...]
    format: Format | None = None
    """None: the weight is dense."""

    @property
    def is_nf4(self) -> bool:
        """True if the weight is in NF4: some products decode it themselves, all other formats are dequantized first."""
        return isinstance(self.format, Nf4)

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the whole weight in `dtype`; a quantized weight is written to `out` if it is given."""
        if self.format is None:
            return self.parts[0].to(dtype)
        return self.format.dequantize(self.parts, shape=self.shape, dtype=dtype, out=out)


@functools.lru_cache(maxsize=1024)
def per_column(values: tuple[float, ...], ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the value of each column's adapter, (R,); copied to the device once and cached."""
    columns = [value for value, rank in zip(values, ranks, strict=True) for _ in range(rank)]
    return torch.tensor(columns, dtype=dtype, device=device)


def columns_of(adapter: int, ranks: Sequence[int]) -> slice:
    """Return the columns of b, or rows of a, of one of several adapters that are side by side."""
    first = sum(ranks[:adapter])
    return slice(first, first + ranks[adapter])


class RowChoice(NamedTuple):
    """The adapter of each row of the batch, among several side by side in the columns of b and rows of a."""

    rows: Tensor
    """(B,) int64: adapter of each row, -1 for none."""
    scales: tuple[float, ...]
    """Scale s of each adapter."""
    ranks: tuple[int, ...]
    """Rank of each adapter."""

    def columns(self, adapter: int) -> slice:
        """Return the columns of b of one adapter."""
        return columns_of(adapter, self.ranks)


class Magnitude(NamedTuple):
    """DoRA's magnitudes of one linear (dora.py)."""

    masters: Tensor
    """Magnitudes m, (N, O) fp32; N = 1 without a choice."""
    row_norms_squared: Tensor
    """||W_o||^2 of the rows of the frozen weight, (O,) fp32."""


class Copies(NamedTuple):
    """An adapter's a (R, I), and b (O, R) times `factor`, in the dtype of products: valid while the masters stay."""

    a: Tensor
    b: Tensor
    factor: float
    """s, times the scale of the dropout."""


class Adapter(NamedTuple):
    """A linear's adapter: fp32 masters a (R, I) and b (O, R), scale s, dropout and DoRA's magnitude."""

    a: Tensor
    b: Tensor
    scale: float | RowChoice
    dropout: Dropout | ChosenDropout | None = None
    """Dropout of the adapter's input; a ChosenDropout if rows choose."""
    magnitude: Magnitude | None = None
    copies: Copies | None = None
    """Copies that replace casts of the masters; None: each product casts them."""

    def down(self, dtype: torch.dtype) -> Tensor:
        """Return a in `dtype`."""
        return self.a.to(dtype) if self.copies is None or self.copies.a.dtype != dtype else self.copies.a


class Linear(NamedTuple):
    """A frozen weight with its adapter and bias."""

    weight: FrozenWeight
    adapter: Adapter | None = None
    bias: Tensor | None = None
    """(O,), without gradient."""


class SavedDora(NamedTuple):
    """Tensors that the backward of a DoRA linear needs (made and read by dora.py).

    dm is the sum over the rows of dy * output, divided by `divisor`: output v and divisor n, or output k v and divisor
    m.
    """

    output: Tensor | None
    """(M, O); None if no backward follows and computing it would take a pass."""
    divisor: Tensor
    """(N, O) fp32."""
    excess: Tensor | None
    """k - 1 in x's dtype, (O,), or (B, O) if rows choose."""
    factor: Tensor | None = None
    """k as (O,) fp32 if it is folded into the quantized weight and B; then `excess` is None."""

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> SavedDora | None:
        """Rebuild from the saved tensors; None if there is no magnitude."""
        return None if tensors[1] is None else cls(*tensors)


class SavedLinear(NamedTuple):
    """Tensors that a linear's backward needs."""

    xa: Tensor | None = None
    """x A^T; None without an adapter."""
    magnitude: SavedDora | None = None


class Needs(NamedTuple):
    """True for each gradient that is needed."""

    x: bool
    a: tuple[bool, ...]
    """a of each linear's adapter."""
    b: tuple[bool, ...]
    magnitude: tuple[bool, ...]


@dataclass(slots=True)
class LinearGradients:
    """Gradients of the linears of one input; None where none is needed or no output gradient arrives."""

    num_linears: int
    x: Tensor | None = None
    """(M, I) in x's dtype."""
    a: list[Tensor | None] = field(init=False)
    """da of each linear, in its masters' dtype."""
    b: list[Tensor | None] = field(init=False)
    magnitude: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        count = self.num_linears
        self.a, self.b, self.magnitude = [None] * count, [None] * count, [None] * count


class AdapterRuns(NamedTuple):
    """The adapters of a Routing's rows: rows of an expert that use the same adapter are neighbours."""

    number: int
    """Number N of adapters."""
    of_rows: Tensor
    """(S,) int64: adapter of each row, -1 for none."""
    ends: Tensor
    """(E * (N + 1),) int32: end of the rows of each adapter of each expert; rows without an adapter come first."""
    bounds: tuple[int, ...] | None
    """(E * (N + 1) + 1) boundaries on the host, from 0 on; None if they are not copied there."""

    @classmethod
    def of(
        cls, key: Tensor, order: Tensor, adapters: tuple[Tensor, int], num_experts: int, *, on_host: bool
    ) -> AdapterRuns:
        """Build from `key`, the (expert, adapter) of each (choice, token), and `order`, which sorts it."""
        by_token, number = adapters
        counts = torch.zeros(num_experts * (number + 1), dtype=torch.int64, device=key.device)
        ends = counts.scatter_add_(0, key, torch.ones_like(key)).cumsum(0)
        return cls(
            number=number,
            of_rows=by_token[order % by_token.shape[0]],
            ends=ends.int(),
            bounds=(0, *ends.tolist()) if on_host else None,
        )

    def runs(self, expert: int) -> Iterator[tuple[int, slice]]:
        """Yield (adapter or -1, its rows) of an expert's rows."""
        assert self.bounds is not None, "the boundaries are on the device only"
        first = expert * (self.number + 1)
        for user in range(self.number + 1):
            start, stop = self.bounds[first + user : first + user + 2]
            if start < stop:
                yield user - 1, slice(start, stop)


class Routing(NamedTuple):
    """The experts of a batch's tokens: one row for each expert of a token, sorted by expert."""

    num_tokens: int
    tokens: Tensor
    """(S,) int64: token of each row. An expert's rows are ordered by choice, then token, as in transformers' eager
    experts."""
    order: Tensor
    """(S,) int64: choice * T + token of each row."""
    inverse: Tensor
    """(S,) int64: row of each (choice, token)."""
    experts: Tensor
    """(S,) int64: expert of each row."""
    ends: Tensor
    """(E,) int32: end of each expert's rows."""
    bounds: tuple[int, ...] | None
    """(E + 1) boundaries on the host, from 0 on; None where reading them would synchronize with the GPU."""
    users: AdapterRuns | None = None
    """The adapter of each row, if tokens choose."""

    @classmethod
    def of(
        cls, choices: Tensor, num_experts: int, *, on_host: bool, adapters: tuple[Tensor, int] | None = None
    ) -> Routing:
        """Build from the experts of each token.

        Args:
            choices: (T, K) int64, the experts of each token.
            num_experts: E.
            on_host: Whether to copy the boundaries to the host.
            adapters: ((T,) int64, the adapter of each token or -1; number of adapters). An expert's rows are then
                sorted by adapter first.
        """
        flat = choices.T.reshape(-1)
        key = flat
        if adapters is not None:
            by_token, number = adapters
            key = flat * (number + 1) + (by_token + 1).repeat(choices.shape[1])
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
            users=None if adapters is None else AdapterRuns.of(key, order, adapters, num_experts, on_host=on_host),
        )

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield (expert, its rows) of the experts that have rows."""
        assert self.bounds is not None, "the boundaries are on the device only"
        for expert, (start, stop) in enumerate(itertools.pairwise(self.bounds)):
            if start < stop:
                yield expert, slice(start, stop)


class ExpertChoice(NamedTuple):
    """The adapters of an expert weight if tokens choose: side by side in the rows of each a and columns of b."""

    numbers_by_user: tuple[int, ...]
    """Adapter index at this weight of each adapter number of the tokens; -1 for none."""
    scales: tuple[float, ...]
    ranks: tuple[int, ...]

    def columns(self, adapter: int) -> slice:
        """Return the columns of b of one adapter."""
        return columns_of(adapter, self.ranks)


class ExpertAdapter(NamedTuple):
    """The adapters of all experts, a (E, R, I) and b (E, O, R), with their scale or choice.

    One of a and b may be (1, ...): all experts share it.
    """

    a: Tensor
    b: Tensor
    scale: float | ExpertChoice

    def runs(self, routing: Routing, expert: int, rows: slice) -> Iterator[tuple[slice, slice | None, float]]:
        """Yield (rows, columns, scale) of each run of an expert's rows with one adapter; columns is None for none."""
        choice = self.scale
        if not isinstance(choice, ExpertChoice):
            yield rows, slice(None), choice
            return
        assert routing.users is not None
        for user, run in routing.users.runs(expert):
            number = choice.numbers_by_user[user] if user >= 0 else -1
            yield (run, None, 0.0) if number < 0 else (run, choice.columns(number), choice.scales[number])


class ExpertLinear(NamedTuple):
    """The linears of all experts: one fused weight (E, O, I), or (E, I, O) if transposed."""

    weight: FrozenWeight
    transposed: bool
    adapter: ExpertAdapter | None
    bias: Tensor | None
    """(E, O), without gradient."""

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight.shape[2 if self.transposed else 1]


class ExpertGradients(NamedTuple):
    """Gradients of an expert linear; None where none is needed."""

    x: Tensor | None
    a: Tensor | None
    b: Tensor | None


_buffers: dict[tuple[torch.device, int], Tensor] = {}
_counters: dict[tuple[torch.device, int], Tensor] = {}


def _key(device: torch.device) -> tuple[torch.device, int]:
    if device.type != "cuda":
        return device, 0
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.current_stream(device).cuda_stream


def reserve_scratch(device: torch.device, nbytes: int) -> None:
    """Allocate the buffer of the device's current stream, before the first step needs it."""
    _buffers[_key(device)] = torch.empty(nbytes, dtype=torch.uint8, device=device)


def scratch_buffer(device: torch.device, nbytes: int = 0) -> Tensor:
    """Return the buffer of the device's current stream, of at least so many bytes."""
    key = _key(device)
    if key not in _buffers or _buffers[key].numel() < nbytes:
        reserve_scratch(device, nbytes)
    return _buffers[key]


def counters(device: torch.device, number: int) -> Tensor:
    """Return `number` or more int32 of the device's current stream, all 0; kernels leave zeros in them."""
    key = _key(device)
    if key not in _counters or len(_counters[key]) < number:
        _counters[key] = torch.zeros(max(number, 2**14), dtype=torch.int32, device=device)
    return _counters[key]


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized memory of this shape and dtype, valid until the next call."""
    nbytes = math.prod(shape) * dtype.itemsize
    return scratch_buffer(device, nbytes)[:nbytes].view(dtype).view(shape)


def take_dense(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (O, I) in `dtype`; on a GPU it is valid until the next one is taken."""
    return weight.dense(dtype, _scratch(weight.shape, dtype, weight.parts[0].device) if uses_scratch(weight) else None)


def uses_scratch(weight: FrozenWeight) -> bool:
    """Return whether the weight is dequantized into the buffer, which can have room for an adapter below it."""
    return weight.format is not None and uses_triton(weight.parts[0])


def take_beside(weight: FrozenWeight, b: Tensor, *, first_rank: int, columns: int) -> Tensor:
    """Return [W | 0 b 0] (O, I + `columns`) of a weight in NF4; b (O, R) is at column I + `first_rank`.

    It is valid as `take_dense`'s.
    """
    out, features = weight.shape
    dense = _scratch((out, features + columns), b.dtype, b.device)
    assert isinstance(weight.format, Nf4)
    dequantize_beside(weight.format, weight.parts, weight.shape, b, first_rank=first_rank, out=dense)
    return dense


def take_chosen(weight: FrozenWeight, dtype: torch.dtype, ends: Tensor) -> Tensor:
    """Return the weight of all experts (E, O, I), of which those without rows may be undefined.

    It is valid as `take_dense`'s. ends (E,) int32: end of each expert's rows.
    """
    if weight.format is None:
        return take_dense(weight, dtype)
    device = weight.parts[0].device
    dense = _scratch(weight.shape, dtype, device) if uses_scratch(weight) else torch.empty(weight.shape, dtype=dtype)
    weight.format.dequantize_chosen(weight.parts, ends, dense)
    return dense


def take_above(weight: FrozenWeight, dtype: torch.dtype, *, rows: int) -> Tensor:
    """Return (O + `rows`, I): W, and uninitialized rows below, valid as `take_dense`'s."""
    out, features = weight.shape
    dense = _scratch((out + rows, features), dtype, weight.parts[0].device)
    weight.dense(dtype, dense[:out])
    return dense
