"""The adapted linears of one input in torch operations: the path of the CPU, and of every dtype.

Each linear's gradient of the input is computed by itself and they are added from the last linear to the first, as
autograd would add those of separate functions: grouping changes no bit.

Where rows choose adapters, neighbours that use the same ones are a part of the input. The base's products are of all
rows; an adapter's are of its own part, as they would be alone: nothing is multiplied in vain, and what is not finite in
one adapter's rows reaches no other adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distlora_kernels import dora_linear
from distlora_kernels.dropout import ChosenDropout, Dropout, dropped
from distlora_kernels.operands import Adapter, Gradients, Kept, KeptOfMagnitude, Linear, Needs, RowChoice
from distlora_kernels.scratch import DenseWeights


class _Own(NamedTuple):
    """What some inputs use of a linear's adapters: one, as if it were alone."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: Dropout | None
    columns: slice
    """Where it lies among the linear's."""

    @property
    def kept_scale(self) -> float:
        """What makes up for dropped inputs."""
        return 1.0 if self.dropout is None else self.dropout.scale


class _Part(NamedTuple):
    """Inputs that use the same adapters."""

    rows: slice
    own: tuple[_Own | None, ...]
    """Of each linear; None for no adapter."""


class _Projected(NamedTuple):
    """A part's inputs of one linear on their way through its adapter."""

    rows: slice
    own: _Own | None
    seen: Tensor
    """What the adapter sees of x."""
    gated: Tensor
    """s x A^T with what makes up for dropped inputs, (M, R); of no rank without an adapter."""


def _parts(linears: Sequence[Linear], num_rows: int) -> list[_Part]:
    """The parts of M = num_rows inputs, in order; one where no linear lets rows choose."""
    choices = {
        index: linear.adapter.scale.rows.tolist()
        for index, linear in enumerate(linears)
        if linear.adapter is not None and isinstance(linear.adapter.scale, RowChoice)
    }
    if not choices:
        return [_Part(slice(0, num_rows), tuple(_own(linear.adapter, None, slice(0)) for linear in linears))]
    chosen = list(zip(*choices.values(), strict=True))
    starts = [row for row in range(len(chosen)) if row == 0 or chosen[row] != chosen[row - 1]]
    size, parts = num_rows // len(chosen), []
    for start, stop in zip(starts, [*starts[1:], len(chosen)], strict=True):
        numbers = dict(zip(choices, chosen[start], strict=True))
        batch_rows = slice(start, stop)
        own = tuple(_own(linear.adapter, numbers.get(index), batch_rows) for index, linear in enumerate(linears))
        parts.append(_Part(slice(start * size, stop * size), own))
    return parts


def _own(adapter: Adapter | None, number: int | None, batch_rows: slice) -> _Own | None:
    """What rows of the batch use of a linear's adapters; `number` says which, None that there is no choice."""
    if adapter is None or number == -1:
        return None
    choice, dropout = adapter.scale, adapter.dropout
    if not isinstance(choice, RowChoice):
        assert not isinstance(dropout, ChosenDropout), "a dropout of each adapter needs a choice"
        return _Own(adapter.a, adapter.b, choice, dropout, slice(None))
    assert number is not None
    assert 0 <= number < len(choice.ranks), f"rows ask for adapter {number} of {len(choice.ranks)}"
    if isinstance(dropout, ChosenDropout):
        dropout = dropout.of(number, batch_rows)
    elif dropout is not None:
        dropout = dropout._replace(rows=dropout.rows[batch_rows])
    columns = choice.columns(number)
    # B as it lies in memory alone, so that its products are the same.
    return _Own(adapter.a[columns], adapter.b[:, columns].contiguous(), choice.scales[number], dropout, columns)


def forward(
    x: Tensor, linears: Sequence[Linear], weights: DenseWeights, *, with_backward: bool
) -> tuple[list[Tensor], list[Kept]]:
    """x (M, I) -> each linear's y (M, O), and what its backward keeps of one with an adapter: s x A^T (M, R), those of
    several parts flat, one after the other.
    """
    parts = _parts(linears, x.shape[0])
    projections = [_project_down(x[part.rows], part.own) for part in parts]
    ys: list[Tensor] = []
    kept: list[Kept] = []
    for index, (linear, *seen_of_parts) in enumerate(zip(linears, *projections, strict=True)):
        weight, bias, adapter = weights.take(index, linear.weight, x.dtype), linear.bias, linear.adapter
        if adapter is None or (adapter.magnitude is None and all(part.own[index] is None for part in parts)):
            ys.append(x @ weight.T if bias is None else torch.addmm(bias, x, weight.T))
            kept.append(Kept(None if adapter is None else x.new_empty(0)))
            continue
        projected = [_projected(part, index, seen, xa) for part, (seen, xa) in zip(parts, seen_of_parts, strict=True)]
        of_magnitude = None
        if adapter.magnitude is None:
            delta = _delta(projected, weight, bias)
            y = torch.addmm(delta, x, weight.T, out=delta)
        else:
            y, of_magnitude = _with_magnitude(x, projected, weight, adapter, bias)
        ys.append(y)
        gated = [part.gated for part in projected]
        kept.append(Kept(gated[0] if len(gated) == 1 else torch.cat([own.flatten() for own in gated]), of_magnitude))
    return ys, kept


def _projected(part: _Part, index: int, seen: Tensor, xa: Tensor) -> _Projected:
    own = part.own[index]
    gated = xa if own is None else (xa * (own.scale * own.kept_scale)).to(xa.dtype)
    return _Projected(part.rows, own, seen, gated)


def _delta(projected: Sequence[_Projected], weight: Tensor, bias: Tensor | None) -> Tensor:
    """gated B^T + bias, (M, O)."""
    alone = len(projected) == 1 and projected[0].own is not None
    whole = None if alone else weight.new_empty(projected[-1].rows.stop, weight.shape[0])
    for rows, own, _, gated in projected:
        out = None if whole is None else whole[rows]
        if own is None:
            assert out is not None
            delta = out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        elif bias is None:
            delta = torch.mm(gated, own.b.to(gated.dtype).T, out=out)
        else:
            delta = torch.addmm(bias, gated, own.b.to(gated.dtype).T, out=out)
    return delta if whole is None else whole


def _with_magnitude(
    x: Tensor, projected: Sequence[_Projected], weight: Tensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, KeptOfMagnitude]:
    """y (M, O) of DoRA, and what backward keeps."""
    factors = dora_linear.factors(adapter, weight @ adapter.a.to(x.dtype).T, x.dtype)
    delta = _delta(projected, weight, bias if adapter.dropout is None else None)
    if adapter.dropout is None:
        return dora_linear.scaled(adapter, factors, torch.addmm(delta, x, weight.T, out=delta), bias)
    output = torch.empty_like(delta)
    for rows, own, seen, _ in projected:
        if own is None:  # Its k is 1, and nothing of v is read.
            output[rows].zero_()
        else:
            torch.addmm(delta[rows], seen, weight.T, alpha=own.kept_scale, out=output[rows])
    rest, kept = dora_linear.scaled_beside_the_base(factors, delta, output, bias)
    return torch.addmm(rest, x, weight.T, out=rest), kept


def backward(
    x: Tensor | None,
    linears: Sequence[Linear],
    weights: DenseWeights,
    kept: Sequence[Kept],
    dys: Sequence[Tensor | None],
    needs: Needs,
) -> Gradients:
    """The gradients of the sum of <y, dy> over the linears; x is None where no linear has an adapter."""
    gradients = Gradients(len(linears))
    parts = [] if x is None else _parts(linears, x.shape[0])
    for index in reversed(range(len(linears))):
        linear, own, dy = linears[index], kept[index], dys[index]
        if dy is None:
            continue
        adapter, scaled, dropped_dy = linear.adapter, dy, None
        if adapter is not None and own.magnitude is not None:
            assert own.magnitude.excess is not None
            if needs.magnitude[index]:
                gradients.magnitude[index] = dora_linear.gradient(adapter, own.magnitude, dy)
            scaled = dora_linear.plus_excess(dy, dy, own.magnitude.excess)
            if adapter.dropout is None:
                dy = scaled
            else:
                dropped_dy = dora_linear.times_excess(dy, own.magnitude.excess)
        dxas = []
        if adapter is not None:
            assert x is not None
            dxas = _adapter_gradients(gradients, index, adapter, x, parts, own, scaled, needs)
        if needs.x:
            weight = weights.take(index, linear.weight, dy.dtype)
            dx = _input_gradient(dxas, dy, dropped_dy, weight)
            gradients.x = dx if gradients.x is None else gradients.x.add_(dx)
    return gradients


class _OfPart(NamedTuple):
    """What the gradient of a part's inputs is made of."""

    rows: slice
    own: _Own | None
    dxa: Tensor | None
    mask: Tensor | None


def _adapter_gradients(
    gradients: Gradients,
    index: int,
    adapter: Adapter,
    x: Tensor,
    parts: Sequence[_Part],
    kept: Kept,
    dy: Tensor,
    needs: Needs,
) -> list[_OfPart]:
    """Sets those of a and b; returns what is left to do for x."""
    assert kept.xa is not None
    found, da, db, start = [], None, None, 0
    for part in parts:
        own, rows = part.own[index], part.rows
        if own is None:
            found.append(_OfPart(rows, None, None, None))
            continue
        dy_part, x_part, rank = dy[rows], x[rows], own.a.shape[0]
        gated = kept.xa.reshape(-1)[start : start + rank * len(x_part)].view(-1, rank)
        start += rank * len(x_part)
        dxa = ((dy_part @ own.b.to(dy.dtype)) * (own.scale * own.kept_scale)).to(dy.dtype)
        if needs.b[index]:
            db = _plus(db, adapter.b, (slice(None), own.columns), dy_part.T @ gated)
        mask = None if own.dropout is None else dropped(own.dropout, *x_part.shape)
        if needs.a[index]:
            da = _plus(da, adapter.a, (own.columns, slice(None)), dxa.T @ _zeroed(x_part, mask))
        found.append(_OfPart(rows, own, dxa, mask))
    if needs.a[index]:
        gradients.a[index] = torch.zeros_like(adapter.a) if da is None else da
    if needs.b[index]:
        gradients.b[index] = torch.zeros_like(adapter.b) if db is None else db
    return found


def _plus(total: Tensor | None, master: Tensor, place: tuple[slice, slice], part: Tensor) -> Tensor:
    """The gradient of a master with `part` added at its place, which may be all of it."""
    part = part.to(master.dtype)
    if part.shape == master.shape:
        return part if total is None else total.add_(part)
    total = torch.zeros_like(master) if total is None else total
    total[place] += part
    return total


def _input_gradient(parts: Sequence[_OfPart], dy: Tensor, dropped_dy: Tensor | None, weight: Tensor) -> Tensor:
    """dX (M, I) of one linear: the adapters' terms, into which the base's product accumulates."""
    if all(part.own is None for part in parts):
        return dy @ weight
    whole = None if len(parts) == 1 else dy.new_empty(dy.shape[0], weight.shape[1])
    for rows, own, dxa, mask in parts:
        out = None if whole is None else whole[rows]
        if own is None or dxa is None:
            assert out is not None
            out.zero_()
            continue
        dx = torch.mm(dxa, own.a.to(dy.dtype), out=out)
        if dropped_dy is not None:
            torch.addmm(dx, dropped_dy[rows], weight, alpha=own.kept_scale, out=dx)
        if mask is not None:
            dx.masked_fill_(mask, 0)
    dx = dx if whole is None else whole
    return torch.addmm(dx, dy, weight, out=dx)


def _project_down(x: Tensor, owns: Sequence[_Own | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each linear what its adapter sees of x, and X A^T of that, by one product where all see the same; of no rank
    without an adapter.
    """
    downs = [x.new_empty(0, x.shape[1]) if own is None else own.a.to(x.dtype) for own in owns]
    dropouts = [None if own is None else own.dropout for own in owns]
    if len(owns) > 1 and not any(dropouts):
        for xa in (x @ torch.cat(downs).T).split([down.shape[0] for down in downs], dim=1):
            yield x, xa
        return
    for dropout, down in zip(dropouts, downs, strict=True):
        seen = x if dropout is None else _zeroed(x, dropped(dropout, *x.shape))
        yield seen, seen @ down.T


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(mask, 0)
