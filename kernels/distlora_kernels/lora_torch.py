"""Run the adapted linears of one input in torch operations: the path of the CPU, and of every dtype.

Each linear's gradient of the input is computed separately and summed from the last linear to the first, as autograd
would sum those of separate functions: grouping changes no bit.

If rows choose adapters, runs of neighbouring rows with the same adapters are a part of the input. The base's products
are over all rows; an adapter's are over its own parts, as they would be alone: no product is wasted, and a non-finite
value in one adapter's rows reaches no other adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels import dora
from distlora_kernels.dropout import ChosenDropout, Dropout, dropped
from distlora_kernels.operands import (
    Adapter,
    Linear,
    LinearGradients,
    Needs,
    RowChoice,
    SavedDora,
    SavedLinear,
    take_dense,
)
from distlora_kernels.products import product


class _PartAdapter(NamedTuple):
    """The one adapter of a linear that a part of the input uses."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: Dropout | None
    columns: slice
    """Its columns among the linear's adapters."""

    @property
    def kept_scale(self) -> float:
        """1 / (probability of keeping an input)."""
        return 1.0 if self.dropout is None else self.dropout.scale


class _Part(NamedTuple):
    """A run of inputs that use the same adapters."""

    rows: slice
    adapters: tuple[_PartAdapter | None, ...]
    """Adapter of each linear; None for none."""


class _Projected(NamedTuple):
    """A part's inputs of one linear, projected by its adapter."""

    rows: slice
    adapter: _PartAdapter | None
    seen: Tensor | None
    """The adapter's input: x after dropout, without rescaling; None where only `gated` is needed."""
    gated: Tensor
    """s k x A^T, (M, R); R = 0 without an adapter."""


def _parts(linears: Sequence[Linear], num_rows: int) -> list[_Part]:
    """Return the parts of M = num_rows inputs, in order; one part if no linear lets rows choose."""
    choices = {
        index: linear.adapter.scale.rows.tolist()
        for index, linear in enumerate(linears)
        if linear.adapter is not None and isinstance(linear.adapter.scale, RowChoice)
    }
    if not choices:
        return [_Part(slice(0, num_rows), tuple(_part_adapter(linear.adapter, None, slice(0)) for linear in linears))]
    chosen = list(zip(*choices.values(), strict=True))
    starts = [row for row in range(len(chosen)) if row == 0 or chosen[row] != chosen[row - 1]]
    size, parts = num_rows // len(chosen), []
    for start, stop in zip(starts, [*starts[1:], len(chosen)], strict=True):
        numbers = dict(zip(choices, chosen[start], strict=True))
        batch_rows = slice(start, stop)
        adapters = tuple(
            _part_adapter(linear.adapter, numbers.get(index), batch_rows) for index, linear in enumerate(linears)
        )
        parts.append(_Part(slice(start * size, stop * size), adapters))
    return parts


def _part_adapter(adapter: Adapter | None, number: int | None, batch_rows: slice) -> _PartAdapter | None:
    """Return the adapter of some rows of the batch; `number` is None if rows do not choose."""
    if adapter is None or number == -1:
        return None
    choice, dropout = adapter.scale, adapter.dropout
    if not isinstance(choice, RowChoice):
        assert not isinstance(dropout, ChosenDropout), "a ChosenDropout needs a RowChoice"
        return _PartAdapter(adapter.a, adapter.b, choice, dropout, slice(None))
    assert number is not None
    assert 0 <= number < len(choice.ranks), f"a row has adapter {number} of {len(choice.ranks)}"
    if isinstance(dropout, ChosenDropout):
        dropout = dropout.of(number, batch_rows)
    elif dropout is not None:
        dropout = dropout._replace(rows=dropout.rows[batch_rows])
    columns = choice.columns(number)
    # Contiguous, as B is alone, so that its products have the same bits.
    return _PartAdapter(adapter.a[columns], adapter.b[:, columns].contiguous(), choice.scales[number], dropout, columns)


def project(x: Tensor, linears: Sequence[Linear]) -> tuple[list[list[_Projected]], list[Tensor | None]]:
    """Return each linear's parts of the inputs x (M, I), projected, and the tensor for its backward.

    That is s k x A^T (M, R) with an adapter; those of several parts are flat, one after the other.
    """
    parts = _parts(linears, x.shape[0])
    projections = [_project_down(x[part.rows], part.adapters) for part in parts]
    projected: list[list[_Projected]] = []
    saved: list[Tensor | None] = []
    for index, (linear, *by_part) in enumerate(zip(linears, *projections, strict=True)):
        is_dora = linear.adapter is not None and linear.adapter.magnitude is not None
        projected.append(
            [
                _projected(part, index, seen if is_dora else None, xa)
                for part, (seen, xa) in zip(parts, by_part, strict=True)
            ]
        )
        gated = [part.gated for part in projected[-1]]
        joined = gated[0] if len(gated) == 1 else torch.cat([each.flatten() for each in gated])
        saved.append(None if linear.adapter is None else joined)
    return projected, saved


def forward(
    x: Tensor, linears: Sequence[Linear], inputs: list[list[_Projected]], *, with_backward: bool
) -> tuple[list[Tensor], list[SavedDora | None]]:
    """Return each linear's y (M, O) of x (M, I), and what a magnitude's backward needs; `project` gives `inputs`."""
    ys: list[Tensor] = []
    magnitudes: list[SavedDora | None] = []
    for (frozen, adapter, bias), projected in zip(linears, inputs, strict=True):
        weight, saved_dora = take_dense(frozen, x.dtype), None
        if adapter is None or (adapter.magnitude is None and all(part.adapter is None for part in projected)):
            y = product(x, weight.T, add=bias)
        elif adapter.magnitude is None:
            delta = _delta(projected, weight, bias)
            y = product(x, weight.T, add=delta, out=delta)
        else:
            y, saved_dora = _with_magnitude(x, projected, weight, adapter, bias)
        ys.append(y)
        magnitudes.append(saved_dora)
    return ys, magnitudes


def _projected(part: _Part, index: int, seen: Tensor | None, xa: Tensor) -> _Projected:
    adapter = part.adapters[index]
    gated = xa if adapter is None else (xa * (adapter.scale * adapter.kept_scale)).to(xa.dtype)
    return _Projected(part.rows, adapter, seen, gated)


def _delta(projected: Sequence[_Projected], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return gated B^T + bias, (M, O)."""
    alone = len(projected) == 1 and projected[0].adapter is not None
    whole = None if alone else weight.new_empty(projected[-1].rows.stop, weight.shape[0])
    for rows, adapter, _, gated in projected:
        out = None if whole is None else whole[rows]
        if adapter is None:
            assert out is not None
            delta = out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        elif bias is None:
            delta = product(gated, adapter.b.to(gated.dtype).T, out=out)
        else:
            delta = product(gated, adapter.b.to(gated.dtype).T, add=bias, out=out)
    return delta if whole is None else whole


def _with_magnitude(
    x: Tensor, projected: Sequence[_Projected], weight: Tensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, SavedDora]:
    """Return DoRA's y (M, O) and the tensors for backward."""
    factors = dora.factors(adapter, product(weight, adapter.down(x.dtype).T), x.dtype)
    delta = _delta(projected, weight, bias if adapter.dropout is None else None)
    if adapter.dropout is None:
        return dora.scaled(adapter, factors, product(x, weight.T, add=delta, out=delta), bias)
    output = torch.empty_like(delta)
    for rows, part_adapter, seen, _ in projected:
        if part_adapter is None:  # k is 1 and v is not read.
            output[rows].zero_()
        else:
            assert seen is not None
            product(seen, weight.T, add=delta[rows], factor=part_adapter.kept_scale, out=output[rows])
    rest, saved_dora = dora.scaled_with_dropout(factors, delta, output, bias)
    return product(x, weight.T, add=rest, out=rest), saved_dora


def backward(
    x: Tensor | None,
    linears: Sequence[Linear],
    saved: Sequence[SavedLinear],
    dys: Sequence[Tensor | None],
    needs: Needs,
) -> LinearGradients:
    """Return the gradients of the sum of <y, dy> over the linears; x is None if no linear has an adapter."""
    gradients = LinearGradients(len(linears))
    parts = [] if x is None else _parts(linears, x.shape[0])
    for index in reversed(range(len(linears))):
        linear, linear_saved, dy = linears[index], saved[index], dys[index]
        if dy is None:
            continue
        adapter, scaled, dropped_dy = linear.adapter, dy, None
        saved_dora = linear_saved.magnitude
        if adapter is not None and saved_dora is not None:
            assert saved_dora.excess is not None
            if needs.magnitude[index]:
                gradients.magnitude[index] = dora.gradient(adapter, saved_dora, dy)
            scaled = dora.plus_excess(dy, dy, saved_dora.excess)
            if adapter.dropout is None:
                dy = scaled
            else:
                dropped_dy = dora.times_excess(dy, saved_dora.excess)
        dxas = []
        if adapter is not None:
            assert x is not None
            dxas = _adapter_gradients(gradients, index, adapter, x, parts, linear_saved, scaled, needs)
        if needs.x:
            weight = take_dense(linear.weight, dy.dtype)
            dx = _input_gradient(dxas, dy, dropped_dy, weight)
            gradients.x = dx if gradients.x is None else gradients.x.add_(dx)
    return gradients


class _PartGradient(NamedTuple):
    """The adapter's part in the gradient of a part's inputs."""

    rows: slice
    adapter: _PartAdapter | None
    dxa: Tensor | None
    mask: Tensor | None


def _adapter_gradients(
    gradients: LinearGradients,
    index: int,
    adapter: Adapter,
    x: Tensor,
    parts: Sequence[_Part],
    saved: SavedLinear,
    dy: Tensor,
    needs: Needs,
) -> list[_PartGradient]:
    """Set the gradients of a and b. Returns the terms of the gradient of x."""
    assert saved.xa is not None
    terms, da, db, start = [], None, None, 0
    for part in parts:
        part_adapter, rows = part.adapters[index], part.rows
        if part_adapter is None:
            terms.append(_PartGradient(rows, None, None, None))
            continue
        dy_part, x_part, rank = dy[rows], x[rows], part_adapter.a.shape[0]
        gated = saved.xa.reshape(-1)[start : start + rank * len(x_part)].view(-1, rank)
        start += rank * len(x_part)
        scale = part_adapter.scale * part_adapter.kept_scale
        dxa = (product(dy_part, part_adapter.b.to(dy.dtype)) * scale).to(dy.dtype)
        if needs.b[index]:
            db = _plus(db, adapter.b, (slice(None), part_adapter.columns), product(dy_part.T, gated))
        mask = None if part_adapter.dropout is None else dropped(part_adapter.dropout, *x_part.shape)
        if needs.a[index]:
            da = _plus(da, adapter.a, (part_adapter.columns, slice(None)), product(dxa.T, _zeroed(x_part, mask)))
        terms.append(_PartGradient(rows, part_adapter, dxa, mask))
    if needs.a[index]:
        gradients.a[index] = torch.zeros_like(adapter.a) if da is None else da
    if needs.b[index]:
        gradients.b[index] = torch.zeros_like(adapter.b) if db is None else db
    return terms


def _plus(total: Tensor | None, master: Tensor, place: tuple[slice, slice], term: Tensor) -> Tensor:
    """Return the gradient of a master with `term` added at `place`, which may be the whole master."""
    term = term.to(master.dtype)
    if term.shape == master.shape:
        return term if total is None else total.add_(term)
    total = torch.zeros_like(master) if total is None else total
    total[place] += term
    return total


def _input_gradient(parts: Sequence[_PartGradient], dy: Tensor, dropped_dy: Tensor | None, weight: Tensor) -> Tensor:
    """Return dX (M, I) of one linear: the base's product accumulates into the adapters' terms."""
    if all(part.adapter is None for part in parts):
        return product(dy, weight)
    whole = None if len(parts) == 1 else dy.new_empty(dy.shape[0], weight.shape[1])
    for rows, adapter, dxa, mask in parts:
        out = None if whole is None else whole[rows]
        if adapter is None or dxa is None:
            assert out is not None
            out.zero_()
            continue
        dx = product(dxa, adapter.a.to(dy.dtype), out=out)
        if dropped_dy is not None:
            product(dropped_dy[rows], weight, add=dx, factor=adapter.kept_scale, out=dx)
        if mask is not None:
            dx.masked_fill_(mask, 0)
    dx = dx if whole is None else whole
    return product(dy, weight, add=dx, out=dx)


def _project_down(x: Tensor, adapters: Sequence[_PartAdapter | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each linear's (adapter input, its product with A^T), by one product if all inputs are equal.

    R = 0 without an adapter.
    """
    downs = [x.new_empty(0, x.shape[1]) if adapter is None else adapter.a.to(x.dtype) for adapter in adapters]
    dropouts = [None if adapter is None else adapter.dropout for adapter in adapters]
    if len(adapters) > 1 and not any(dropouts):
        for xa in product(x, torch.cat(downs).T).split([down.shape[0] for down in downs], dim=1):
            yield x, xa
        return
    for dropout, down in zip(dropouts, downs, strict=True):
        seen = x if dropout is None else _zeroed(x, dropped(dropout, *x.shape))
        yield seen, product(seen, down.T)


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(mask, 0)
