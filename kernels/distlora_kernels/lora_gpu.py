"""Run the adapted linears of one input on a GPU.

The adapter's products run in our kernels. The base product is a library GEMM on a weight dequantized into the scratch,
or fused with the dequantization for few rows (fused.py).

Large tensors are moved as seldom as possible: x is read once for all A (and by each base GEMM) and once for all dA,
each dY once for dxa and dB if the rank is small; dX is written once and the library's GEMMs accumulate into it. The
scale s (and dropout's) is multiplied into B before B is rounded to x's dtype, so x A^T needs no scaling. Where it pays
the adapter's term is further columns of the base product's operands (extension.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels import dora, operands
from distlora_kernels.dropout import ChosenDropout, Dropout, apply_dropout
from distlora_kernels.extension import carrier, extends, padded
from distlora_kernels.formats.nf4 import BLOCK
from distlora_kernels.fused import choose_variant, fused_linear, fused_linear_dx
from distlora_kernels.operands import (
    Adapter,
    FrozenWeight,
    Linear,
    LinearGradients,
    Needs,
    RowChoice,
    SavedDora,
    SavedLinear,
    per_column,
)
from distlora_kernels.skinny import skinny_down, skinny_dy, skinny_grad, skinny_up


class _Extended(NamedTuple):
    """The input of linears with their projections behind its rows."""

    rows: Tensor
    """[x | x A^T of the linears], (M, I + R), within longer rows."""
    first_rank: int
    """First column behind I of the linear's own x A^T."""


_Input = Tensor | _Extended | None
"""x A^T (M, R) of a linear, alone or behind x; None without an adapter."""


def forward(
    x: Tensor, linears: Sequence[Linear], inputs: list[_Input], *, with_backward: bool
) -> tuple[list[Tensor], list[SavedDora | None]]:
    """Return each linear's y (M, O) of x (M, I), and what a magnitude's backward needs; `project` gives `inputs`."""
    x = _row_major(x)
    ys: list[Tensor] = []
    magnitudes: list[SavedDora | None] = []
    for linear, xa in zip(linears, inputs, strict=True):
        weight, adapter, bias = linear
        saved_dora = None
        if isinstance(xa, _Extended):
            y = _extended(linear, xa)
        elif adapter is None or xa is None:
            y = _Base(weight, x).output(x, bias)
        elif adapter.magnitude is None:
            y = _adapted(_Base(weight, x), x, xa, adapter, bias)
        elif dora.can_fold(adapter, weight, x.dtype):
            wa = fused_linear(adapter.down(x.dtype), weight).T
            factors = dora.factors(adapter, wa, torch.float32)
            factor = factors.excess + 1
            weight, lora, _ = dora.folded(linear, factor)
            assert lora is not None
            y = _adapted(_Base(weight, x), x, xa, lora, bias)
            saved_dora = dora.saved_for_folded(linear, factors, factor, y, with_backward=with_backward)
        else:
            y, saved_dora = _with_magnitude(_Base(weight, x), x, xa, adapter, bias)
        ys.append(y)
        magnitudes.append(saved_dora)
    return ys, magnitudes


class _Base:
    """The product with one frozen weight W (O, I), in the variant chosen for the rows of x."""

    def __init__(self, weight: FrozenWeight, x: Tensor) -> None:
        self.weight = weight
        self.dense = None if choose_variant(x, weight) == "fused" else operands.take_dense(weight, x.dtype)
        """The dense weight in x's dtype, valid until the next is taken; None if it is decoded inside the product."""

    def output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias, (M, O)."""
        if self.dense is None:
            return fused_linear(x, self.weight, bias=bias)
        return x @ self.dense.T if bias is None else torch.addmm(bias, x, self.dense.T)

    def plus(self, addend: Tensor, x: Tensor) -> Tensor:
        """Return addend + x W^T, (M, O); the addend may be overwritten."""
        if self.dense is None:
            return fused_linear(x, self.weight, addend=addend)
        return torch.addmm(addend, x, self.dense.T, out=addend)


def _adapted(base: _Base, x: Tensor, xa: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
    """Return x W^T + s (x A^T) B^T + bias, (M, O)."""
    up, choice = _scaled_up(adapter, x.dtype), _choice(adapter)
    if base.dense is None and choice is None:
        return fused_linear(x, base.weight, xa=xa, b=up, bias=bias)
    return base.plus(skinny_up(xa, up, bias=bias, choice=choice), x)


def _extended(linear: Linear, wide: _Extended) -> Tensor:
    """Return x W^T + s (x A^T) B^T + bias, (M, O), by one product."""
    adapter, columns = linear.adapter, wide.rows.shape[1]
    assert adapter is not None
    up, room = _scaled_up(adapter, wide.rows.dtype), wide.rows.stride(0) - linear.weight.shape[1]
    dense = operands.take_beside(linear.weight, up, first_rank=wide.first_rank, columns=room)[:, :columns]
    return wide.rows @ dense.T if linear.bias is None else torch.addmm(linear.bias, wide.rows, dense.T)


def _with_magnitude(
    base: _Base, x: Tensor, xa: Tensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, SavedDora]:
    """Return DoRA's y (M, O) and the tensors for backward."""
    down = adapter.down(x.dtype)
    wa = fused_linear(down, base.weight).T if base.dense is None else base.dense @ down.T
    factors = dora.factors(adapter, wa, x.dtype)
    if adapter.dropout is None:
        return dora.scaled(adapter, factors, _adapted(base, x, xa, adapter, bias), bias)
    delta = skinny_up(xa, _scaled_up(adapter, x.dtype), choice=_choice(adapter))
    output = base.plus(delta.clone(), apply_dropout(x, adapter.dropout))
    rest, saved_dora = dora.scaled_with_dropout(factors, delta, output, bias)
    return base.plus(rest, x), saved_dora


def backward(
    x: Tensor | None,
    linears: Sequence[Linear],
    saved: Sequence[SavedLinear],
    dys: Sequence[Tensor | None],
    needs: Needs,
) -> LinearGradients:
    """Return the gradients of the sum of <y, dy> over the linears; x is None if no linear has an adapter."""
    gradients = LinearGradients(len(linears))
    linears = [
        # The LoRA that forward folded it into.
        dora.folded(linear, each.magnitude.factor) if each.magnitude and each.magnitude.factor is not None else linear
        for linear, each in zip(linears, saved, strict=True)
    ]
    rows = {index: _row_major(dy) for index, dy in enumerate(dys) if dy is not None}
    carried = _carried(linears, saved, rows) if needs.x else None
    places = _places(linears, saved, rows, carried)
    dxas: dict[int, Tensor] = {}
    through_dropout: dict[int, Tensor] = {}
    for index, dy in rows.items():
        adapter, (xa, saved_dora) = linears[index].adapter, saved[index]
        if adapter is None or xa is None:
            continue
        scaled, factor = dy, None if saved_dora is None else saved_dora.factor
        if saved_dora is not None and saved_dora.excess is not None:
            if needs.magnitude[index]:
                gradients.magnitude[index] = dora.gradient(adapter, saved_dora, dy)
            scaled = dora.plus_excess(dy, dy, saved_dora.excess)
            if adapter.dropout is None:
                rows[index] = scaled
            else:
                through_dropout[index] = dora.times_excess(dy, saved_dora.excess)
        up = _scaled_up(adapter, dy.dtype)
        if saved_dora is not None and factor is not None and needs.magnitude[index]:
            assert saved_dora.output is not None
            dxas[index], db, dm = dora.dy_gradients(
                dy, up, xa, saved_dora.output, saved_dora.divisor[0], scale=_factor(adapter)
            )
            gradients.magnitude[index] = dm[None]
        else:
            out, copy = places.get(index, (None, None))
            dxas[index], db = skinny_dy(
                scaled, up, xa, scale=_factor(adapter), choice=_choice(adapter), out=out, copy=copy
            )
        if factor is not None:
            db = db.mul_(factor[:, None])
        gradients.b[index] = db.to(adapter.b.dtype) if needs.b[index] else None
    if x is not None:
        _add_down_gradients(gradients, _row_major(x), linears, dxas, needs)
    if needs.x:
        gradients.x = _input_gradient(linears, rows, dxas, through_dropout, carried)
    return gradients


class _Carried(NamedTuple):
    """A dY whose product for dX takes the terms of a group's adapters, with their dxa behind its rows."""

    linear: int
    """Index of its linear."""
    rows: Tensor
    """[dY | dxa of the group], (M, O + R), within longer rows."""
    columns: dict[int, slice]
    """Columns of each linear's dxa behind O."""

    @property
    def out(self) -> int:
        """O of its linear."""
        return self.rows.shape[1] - max(columns.stop for columns in self.columns.values())

    def places(self) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Return where skinny_dy writes each linear's dxa, and dY if that is carried."""
        dxas = self.rows[:, self.out :]
        return {
            index: (dxas[:, columns], self.rows[:, : self.out] if index == self.linear else None)
            for index, columns in self.columns.items()
        }

    def input_gradient(self, linears: Sequence[Linear]) -> Tensor:
        """Return its dY W and the adapters' terms, (M, I)."""
        rank = self.rows.shape[1] - self.out
        dense = operands.take_above(linears[self.linear].weight, self.rows.dtype, rows=rank)
        torch.cat([_adapter(linears, index).down(dense.dtype) for index in self.columns], out=dense[self.out :])
        return self.rows @ dense


def _carried(linears: Sequence[Linear], saved: Sequence[SavedLinear], dys: dict[int, Tensor]) -> _Carried | None:
    """Return the dY to extend, before it is filled; None if none pays."""
    ranks, outs = _plain_ranks(linears, saved, dys), {}
    for index in list(ranks):
        weight, dy = linears[index].weight, dys[index]
        if choose_variant(dy, weight) != "scratch":
            del ranks[index]
        elif operands.uses_scratch(weight):
            outs[index] = dy.shape[1]
    rank = sum(ranks.values())
    first = next(iter(dys.values()))
    copied = carrier(first.shape[0], linears[0].weight.shape[1], outs, rank, first.itemsize)
    if copied is None:
        return None
    stops = list(itertools.accumulate(ranks.values()))
    columns = {each: slice(stop - ranks[each], stop) for each, stop in zip(ranks, stops, strict=True)}
    wide = first.new_empty(first.shape[0], outs[copied] + padded(rank))
    return _Carried(copied, wide[:, : outs[copied] + rank], columns)


def _plain_ranks(linears: Sequence[Linear], saved: Sequence[SavedLinear], dys: dict[int, Tensor]) -> dict[int, int]:
    """Return the rank of each linear that has a dY and whose adapter is plain and without magnitude."""
    adapters = {index: linears[index].adapter for index in dys if saved[index].magnitude is None}
    return {index: _width(each) for index, each in adapters.items() if each is not None and _is_plain(each)}


def _places(
    linears: Sequence[Linear], saved: Sequence[SavedLinear], dys: dict[int, Tensor], carried: _Carried | None
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Return where skinny_dy writes dxa (and dY) of a group's linears: in neighbouring columns."""
    places = {} if carried is None else carried.places()
    ranks = {index: rank for index, rank in _plain_ranks(linears, saved, dys).items() if index not in places}
    if len(ranks) > 1:
        dy = dys[min(ranks)]
        together = dy.new_empty(dy.shape[0], sum(ranks.values()))
        dxas = zip(ranks, together.split(list(ranks.values()), dim=1), strict=True)
        places |= {index: (dxa, None) for index, dxa in dxas}
    return places


def _input_gradient(
    linears: Sequence[Linear],
    dys: dict[int, Tensor],
    dxas: dict[int, Tensor],
    through_dropout: dict[int, Tensor],
    carried: _Carried | None,
) -> Tensor | None:
    """Return dX (M, I): the adapters' terms come first and the base GEMMs accumulate into them.

    A fused product adds its adapter's term itself, as that of `carried` does for its group. `through_dropout` has
    (k - 1) dY of DoRA linears with dropout.
    """
    total = None if carried is None else carried.input_gradient(linears)
    fused = {index for index, dy in dys.items() if choose_variant(dy, linears[index].weight) == "fused"}
    inside: dict[int, tuple[Tensor, Tensor]] = {}

    def add(term: Tensor) -> None:
        nonlocal total
        total = term if total is None else total.add_(term)

    separate = []
    for index, dxa in dxas.items():
        adapter = _adapter(linears, index)
        if carried is not None and index in carried.columns:
            continue
        if index in fused and _is_plain(adapter):
            inside[index] = (dxa, adapter.down(dxa.dtype))
        else:
            separate.append(index)
    for group in _groups(linears, separate):
        adapters, together = [_adapter(linears, index) for index in group], _side_by_side([dxas[i] for i in group])
        down = _joined_down(adapters, together.dtype)
        add(skinny_up(together, down.T, choice=_joined_choice(adapters), dropout=adapters[0].dropout))
    for index, dy in through_dropout.items():
        weight, dropout = linears[index].weight, _adapter(linears, index).dropout
        assert dropout is not None
        dx = fused_linear_dx(dy, weight) if index in fused else dy @ operands.take_dense(weight, dy.dtype)
        add(apply_dropout(dx, dropout))
    for index, dy in dys.items():
        weight = linears[index].weight
        if carried is not None and index == carried.linear:
            continue
        if index in fused:
            dxa_and_a = inside.get(index, (None, None))
            add(fused_linear_dx(dy, weight, dxa=dxa_and_a[0], a=dxa_and_a[1]))
        elif total is None:
            total = dy @ operands.take_dense(weight, dy.dtype)
        else:
            torch.addmm(total, dy, operands.take_dense(weight, dy.dtype), out=total)
    return total


def _add_down_gradients(
    gradients: LinearGradients, x: Tensor, linears: Sequence[Linear], dxas: dict[int, Tensor], needs: Needs
) -> None:
    """Add dA of each linear; x is read once per group."""
    for group in _groups(linears, [index for index in dxas if needs.a[index]]):
        adapters, together = [_adapter(linears, index) for index in group], _side_by_side([dxas[i] for i in group])
        choice = _joined_choice(adapters)
        da = skinny_grad(together, x, choice=choice, dropout=adapters[0].dropout)
        parts = [da]
        if len(group) > 1:
            by_adapter = da.unflatten(0, (1 if choice is None else len(choice.ranks), -1))
            widths = [_width(adapter) for adapter in adapters]
            parts = [part.flatten(0, 1) for part in by_adapter.split(widths, dim=1)]
        for index, adapter, part in zip(group, adapters, parts, strict=True):
            gradients.a[index] = part.to(adapter.a.dtype)


def project(x: Tensor, linears: Sequence[Linear]) -> tuple[list[_Input], list[Tensor | None]]:
    """Return x A^T (M, R) of each linear, for forward and for backward; x is read once per group."""
    x = _row_major(x)
    inputs: list[_Input] = [None] * len(linears)
    xas: list[Tensor | None] = [None] * len(linears)
    for group in _groups(linears, [index for index, linear in enumerate(linears) if linear.adapter is not None]):
        adapters = [_adapter(linears, index) for index in group]
        down, choice = _joined_down(adapters, x.dtype), _joined_choice(adapters)
        widths, rows = [_width(adapter) for adapter in adapters], None
        if _pays(x, [linears[index] for index in group], sum(widths)):
            features, rank = x.shape[1], down.shape[0]
            rows = x.new_empty(x.shape[0], features + padded(rank))[:, : features + rank]
            # x A^T is written twice: backward must not keep the copy of x.
            together = skinny_down(x, down, wide=rows)
        else:
            together = skinny_down(x, down, choice=choice, dropout=adapters[0].dropout)
        firsts = itertools.accumulate(widths, initial=0)
        for index, xa, first in zip(group, together.split(widths, dim=1), firsts, strict=False):
            xas[index], inputs[index] = xa, xa if rows is None else _Extended(rows, first)
    return inputs, xas


def _pays(x: Tensor, group: Sequence[Linear], rank: int) -> bool:
    """Return whether the products of a group of linears are extended."""
    for weight, adapter, _ in group:
        assert adapter is not None
        if adapter.magnitude is not None or not _is_plain(adapter) or choose_variant(x, weight) == "fused":
            return False
        if not (weight.is_nf4 and operands.uses_scratch(weight)):
            return False
    (m, features), written = x.shape, sum(linear.weight.shape[0] for linear in group)
    return features % BLOCK == 0 and extends(
        m, written=written, copied=features, rank=rank, products=len(group), itemsize=x.itemsize
    )


def _adapter(linears: Sequence[Linear], index: int) -> Adapter:
    adapter = linears[index].adapter
    assert adapter is not None
    return adapter


def _width(adapter: Adapter) -> int:
    """Return the columns of x A^T."""
    return max(adapter.scale.ranks) if isinstance(adapter.scale, RowChoice) else adapter.a.shape[0]


def _groups(linears: Sequence[Linear], indices: Sequence[int]) -> list[list[int]]:
    """Group linears whose products with the input are joined.

    A group has adapters of all rows without dropout, or one choice of rows among adapters of equal ranks. Any other
    linear is a group by itself.
    """
    groups: dict[object, list[int]] = {}
    for index in indices:
        adapter = _adapter(linears, index)
        key: object = f"linear {index}"
        if _is_plain(adapter):
            key = "all rows"
        elif adapter.dropout is None and isinstance(adapter.scale, RowChoice) and len(set(adapter.scale.ranks)) == 1:
            key = id(adapter.scale.rows)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _joined_down(adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """Return the A of a group in `dtype` as one matrix; the linears' ranks of one chosen adapter are neighbours."""
    downs, scale = [adapter.down(dtype) for adapter in adapters], adapters[0].scale
    if len(downs) == 1:
        return downs[0]
    if not isinstance(scale, RowChoice):
        neighbours = len({down.untyped_storage().data_ptr() for down in downs}) == 1 and all(
            first.is_contiguous() and first.data_ptr() + first.nbytes == other.data_ptr()
            for first, other in itertools.pairwise(downs)
        )
        if neighbours and all(adapter.copies is not None for adapter in adapters):  # As AdapterCopies lays them out.
            return downs[0].as_strided((sum(map(len, downs)), downs[0].shape[1]), downs[0].stride())
        return torch.cat(downs)
    return torch.cat([down.unflatten(0, (len(scale.ranks), -1)) for down in downs], dim=1).flatten(0, 1)


def _joined_choice(adapters: Sequence[Adapter]) -> RowChoice | None:
    choice = _choice(adapters[0])
    if choice is None or len(adapters) == 1:
        return choice
    return choice._replace(ranks=(sum(map(_width, adapters)),) * len(choice.ranks))


def _is_plain(adapter: Adapter) -> bool:
    """Return whether all rows use the adapter without dropout, so that its products can be joined."""
    return adapter.dropout is None and not isinstance(adapter.scale, RowChoice)


def _choice(adapter: Adapter | None) -> RowChoice | None:
    """Return the choice, with each adapter's dropout scale multiplied into its scale."""
    if adapter is None or not isinstance(adapter.scale, RowChoice):
        return None
    choice, dropout = adapter.scale, adapter.dropout
    if not isinstance(dropout, ChosenDropout):
        return choice
    return choice._replace(scales=tuple(s * k for s, k in zip(choice.scales, dropout.scales, strict=True)))


def _factor(adapter: Adapter) -> float:
    """Return the factor of dB, besides the scales of a choice."""
    scale = 1.0 if isinstance(adapter.scale, RowChoice) else adapter.scale
    return scale * adapter.dropout.scale if isinstance(adapter.dropout, Dropout) else scale


def _scaled_up(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """Return s b (O, R) in `dtype`, multiplied in fp32 and rounded once, by one kernel."""
    scale: float | Tensor = _factor(adapter)
    if (copies := adapter.copies) is not None and copies.factor == scale and copies.b.dtype == dtype:
        return copies.b
    if (choice := _choice(adapter)) is not None:
        scale = per_column(
            tuple(scale * each for each in choice.scales), choice.ranks, adapter.b.dtype, adapter.b.device
        )
    return torch.mul(adapter.b, scale, out=torch.empty_like(adapter.b, dtype=dtype))


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Return the matrices (M, R) as one, a view if they are neighbouring columns of one matrix."""
    first = parts[0]
    if all(
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.stride() == other.stride()
        and one.storage_offset() + one.shape[1] == other.storage_offset()
        for one, other in itertools.pairwise(parts)
    ):
        return first.as_strided((first.shape[0], sum(part.shape[1] for part in parts)), first.stride())
    return torch.cat(parts, dim=1)


def _row_major(matrix: Tensor) -> Tensor:
    """Return the matrix with unit stride along rows; an expanded gradient has not."""
    return matrix if matrix.stride(-1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()
