"""The adapted linears of one input on a GPU: the adapter's products in our kernels, the base product by a library GEMM
on a weight dequantized into the scratch, or fused with the dequantization where M is small (variants.py).

What is large is moved as seldom as can be: x is read once for all A (twice with the base GEMM, which no adapter avoids)
and once for all dA, each dY once for dxa and dB where the rank is small, dX is written once and then accumulated into
by the library's GEMMs. The scale s (and what makes up for dropout) is multiplied into B before B is rounded to x's
dtype, so no gate is applied to x A^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distlora_kernels import dora_linear, variants
from distlora_kernels.dora import dy_gradients
from distlora_kernels.dropout import ChosenDropout, Dropout, seen_of
from distlora_kernels.fused import fused_linear, fused_linear_dx
from distlora_kernels.operands import (
    Adapter,
    FrozenWeight,
    Gradients,
    Kept,
    KeptOfMagnitude,
    Linear,
    Needs,
    RowChoice,
    per_column,
)
from distlora_kernels.scratch import DenseWeights
from distlora_kernels.skinny import skinny_down, skinny_dy, skinny_grad, skinny_up


def forward(
    x: Tensor, linears: Sequence[Linear], weights: DenseWeights, *, with_backward: bool
) -> tuple[list[Tensor], list[Kept]]:
    """x (M, I) -> each linear's y (M, O), and what its backward keeps: x A^T (M, R), compact where rows choose."""
    x = _row_major(x)
    ys, kept = [], []
    for index, (linear, xa) in enumerate(zip(linears, _project_down(x, linears), strict=True)):
        weight, adapter, bias = linear
        if adapter is None or xa is None:
            y, own = _Base(index, weight, weights, x).output(x, bias), Kept()
        elif adapter.magnitude is None:
            y, own = _adapted(_Base(index, weight, weights, x), x, xa, adapter, bias), Kept(xa)
        elif dora_linear.folds(adapter, weight, x.dtype):
            wa = fused_linear(adapter.a.to(x.dtype), weight).T
            factors = dora_linear.factors(adapter, wa, torch.float32)
            factor = factors.excess + 1
            weight, lora, _ = dora_linear.folded(linear, factor)
            assert lora is not None
            y = _adapted(_Base(index, weight, weights, x), x, xa, lora, bias)
            own = Kept(xa, dora_linear.kept_of_folded(linear, factors, factor, y, with_backward=with_backward))
        else:
            y, of_magnitude = _with_magnitude(_Base(index, weight, weights, x), x, xa, adapter, bias)
            own = Kept(xa, of_magnitude)
        ys.append(y)
        kept.append(own)
    return ys, kept


class _Base:
    """The product with one frozen weight W (O, I), in the variant that is chosen for the rows of x."""

    def __init__(self, index: int, weight: FrozenWeight, weights: DenseWeights, x: Tensor) -> None:
        self.weight = weight
        self.dense = None if variants.choose(x, weight) == "fused" else weights.take(index, weight, x.dtype)
        """The whole weight in x's dtype, until the next is taken; None where it is decoded inside the product."""

    def output(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, (M, O)."""
        if self.dense is None:
            return fused_linear(x, self.weight, bias=bias)
        return x @ self.dense.T if bias is None else torch.addmm(bias, x, self.dense.T)

    def plus(self, addend: Tensor, x: Tensor) -> Tensor:
        """addend + x W^T, (M, O); the addend may be overwritten."""
        if self.dense is None:
            return fused_linear(x, self.weight, addend=addend)
        return torch.addmm(addend, x, self.dense.T, out=addend)

    def of_rows(self, a: Tensor) -> Tensor:
        """W a^T, (O, R) of a (R, I)."""
        return fused_linear(a, self.weight).T if self.dense is None else self.dense @ a.T


def _adapted(base: _Base, x: Tensor, xa: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
    """x W^T + s (x A^T) B^T + bias, (M, O)."""
    up, choice = _scaled_up(adapter, x.dtype), _choice(adapter)
    if base.dense is None and choice is None:
        return fused_linear(x, base.weight, xa=xa, b=up, bias=bias)
    return base.plus(skinny_up(xa, up, bias=bias, choice=choice), x)


def _with_magnitude(
    base: _Base, x: Tensor, xa: Tensor, adapter: Adapter, bias: Tensor | None
) -> tuple[Tensor, KeptOfMagnitude]:
    """y (M, O) of DoRA, and what backward keeps."""
    factors = dora_linear.factors(adapter, base.of_rows(adapter.a.to(x.dtype)), x.dtype)
    if adapter.dropout is None:
        return dora_linear.scaled(adapter, factors, _adapted(base, x, xa, adapter, bias), bias)
    delta = skinny_up(xa, _scaled_up(adapter, x.dtype), choice=_choice(adapter))
    output = base.plus(delta.clone(), seen_of(x, adapter.dropout))
    rest, own = dora_linear.scaled_beside_the_base(factors, delta, output, bias)
    return base.plus(rest, x), own


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
    linears = [_as_it_ran(linear, own.magnitude) for linear, own in zip(linears, kept, strict=True)]
    rows = {index: _row_major(dy) for index, dy in enumerate(dys) if dy is not None}
    dxas: dict[int, Tensor] = {}
    through_dropout: dict[int, Tensor] = {}
    for index, dy in rows.items():
        adapter, (xa, own) = linears[index].adapter, kept[index]
        if adapter is None or xa is None:
            continue
        scaled, factor = dy, None if own is None else own.factor
        if own is not None and own.excess is not None:
            if needs.magnitude[index]:
                gradients.magnitude[index] = dora_linear.gradient(adapter, own, dy)
            scaled = dora_linear.plus_excess(dy, dy, own.excess)
            if adapter.dropout is None:
                rows[index] = scaled
            else:
                through_dropout[index] = dora_linear.times_excess(dy, own.excess)
        up = _scaled_up(adapter, dy.dtype)
        if own is not None and factor is not None and needs.magnitude[index]:
            assert own.output is not None
            dxas[index], db, dm = dy_gradients(dy, up, xa, own.output, own.divisor[0], scale=_factor(adapter))
            gradients.magnitude[index] = dm[None]
        else:
            dxas[index], db = skinny_dy(scaled, up, xa, scale=_factor(adapter), choice=_choice(adapter))
        if factor is not None:
            db = db.mul_(factor[:, None])
        gradients.b[index] = db.to(adapter.b.dtype) if needs.b[index] else None
    if x is not None:
        _add_down_gradients(gradients, _row_major(x), linears, dxas, needs)
    if needs.x:
        gradients.x = _input_gradient(linears, weights, rows, dxas, through_dropout)
    return gradients


def _as_it_ran(linear: Linear, own: KeptOfMagnitude | None) -> Linear:
    """The linear, or the LoRA that forward made of it."""
    return linear if own is None or own.factor is None else dora_linear.folded(linear, own.factor)


def _input_gradient(
    linears: Sequence[Linear],
    weights: DenseWeights,
    dys: dict[int, Tensor],
    dxas: dict[int, Tensor],
    through_dropout: dict[int, Tensor],
) -> Tensor | None:
    """dX (M, I): the adapters' terms first, then the base GEMMs accumulate into them; a fused product adds its own.

    `through_dropout`: of linears whose magnitude scales what the dropout lets through of the base, (k - 1) dY.
    """
    total: Tensor | None = None
    fused = {index for index, dy in dys.items() if variants.choose(dy, linears[index].weight) == "fused"}
    inside: dict[int, tuple[Tensor, Tensor]] = {}

    def add(part: Tensor) -> None:
        nonlocal total
        total = part if total is None else total.add_(part)

    apart = []
    for index, dxa in dxas.items():
        adapter = _adapter(linears, index)
        if index in fused and _is_plain(adapter):
            inside[index] = (dxa, adapter.a.to(dxa.dtype))
        else:
            apart.append(index)
    for group in _groups(linears, apart):
        adapters, together = [_adapter(linears, index) for index in group], _side_by_side([dxas[i] for i in group])
        down = _joined_down(adapters, together.dtype)
        add(skinny_up(together, down.T, choice=_joined_choice(adapters), dropout=adapters[0].dropout))
    for index, dy in through_dropout.items():
        weight, dropout = linears[index].weight, _adapter(linears, index).dropout
        assert dropout is not None
        dx = fused_linear_dx(dy, weight) if index in fused else dy @ weights.take(index, weight, dy.dtype)
        add(seen_of(dx, dropout))
    for index, dy in dys.items():
        weight = linears[index].weight
        if index in fused:
            own = inside.get(index)
            add(fused_linear_dx(dy, weight) if own is None else fused_linear_dx(dy, weight, dxa=own[0], a=own[1]))
        elif total is None:
            total = dy @ weights.take(index, weight, dy.dtype)
        else:
            torch.addmm(total, dy, weights.take(index, weight, dy.dtype), out=total)
    return total


def _add_down_gradients(
    gradients: Gradients, x: Tensor, linears: Sequence[Linear], dxas: dict[int, Tensor], needs: Needs
) -> None:
    """dA of each linear; x is read once for those of a group."""
    for group in _groups(linears, [index for index in dxas if needs.a[index]]):
        adapters, together = [_adapter(linears, index) for index in group], _side_by_side([dxas[i] for i in group])
        choice = _joined_choice(adapters)
        da = skinny_grad(together, x, choice=choice, dropout=adapters[0].dropout)
        parts = [da]
        if len(group) > 1:
            of_adapters = da.unflatten(0, (1 if choice is None else len(choice.ranks), -1))
            widths = [_width(adapter) for adapter in adapters]
            parts = [part.flatten(0, 1) for part in of_adapters.split(widths, dim=1)]
        for index, adapter, part in zip(group, adapters, parts, strict=True):
            gradients.a[index] = part.to(adapter.a.dtype)


def _project_down(x: Tensor, linears: Sequence[Linear]) -> list[Tensor | None]:
    """x A^T of each linear (M, R); x is read once for those of a group."""
    kept: list[Tensor | None] = [None] * len(linears)
    for group in _groups(linears, [index for index, linear in enumerate(linears) if linear.adapter is not None]):
        adapters = [_adapter(linears, index) for index in group]
        down, choice = _joined_down(adapters, x.dtype), _joined_choice(adapters)
        together = skinny_down(x, down, choice=choice, dropout=adapters[0].dropout)
        widths = [_width(adapter) for adapter in adapters]
        for index, xa in zip(group, together.split(widths, dim=1), strict=True):
            kept[index] = xa
    return kept


def _adapter(linears: Sequence[Linear], index: int) -> Adapter:
    adapter = linears[index].adapter
    assert adapter is not None
    return adapter


def _width(adapter: Adapter) -> int:
    """Columns of x A^T."""
    return max(adapter.scale.ranks) if isinstance(adapter.scale, RowChoice) else adapter.a.shape[0]


def _groups(linears: Sequence[Linear], indices: Sequence[int]) -> list[list[int]]:
    """Linears whose products with their input are joined: those whose adapters see all of it, for all rows, or by one
    choice of theirs among adapters of equal ranks. Each of the others is a group.
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
    """The A of a group in `dtype` as those of one linear: of each adapter that rows choose, the linears' ranks are
    neighbours.
    """
    downs, scale = [adapter.a.to(dtype) for adapter in adapters], adapters[0].scale
    if len(downs) == 1:
        return downs[0]
    if not isinstance(scale, RowChoice):
        return torch.cat(downs)
    return torch.cat([down.unflatten(0, (len(scale.ranks), -1)) for down in downs], dim=1).flatten(0, 1)


def _joined_choice(adapters: Sequence[Adapter]) -> RowChoice | None:
    choice = _choice(adapters[0])
    if choice is None or len(adapters) == 1:
        return choice
    return choice._replace(ranks=(sum(map(_width, adapters)),) * len(choice.ranks))


def _is_plain(adapter: Adapter) -> bool:
    """Whether all rows use it and it sees all of x, so that its products may be joined with its siblings'."""
    return adapter.dropout is None and not isinstance(adapter.scale, RowChoice)


def _choice(adapter: Adapter | None) -> RowChoice | None:
    """With scales that make up for what each adapter's own dropout leaves out."""
    if adapter is None or not isinstance(adapter.scale, RowChoice):
        return None
    choice, dropout = adapter.scale, adapter.dropout
    if not isinstance(dropout, ChosenDropout):
        return choice
    return choice._replace(scales=tuple(s * k for s, k in zip(choice.scales, dropout.scales, strict=True)))


def _factor(adapter: Adapter) -> float:
    """What dB is scaled by, beside the scales of a choice."""
    scale = 1.0 if isinstance(adapter.scale, RowChoice) else adapter.scale
    return scale * adapter.dropout.scale if isinstance(adapter.dropout, Dropout) else scale


def _scaled_up(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """s b (O, R) in `dtype`: multiplied in fp32 and rounded once, by one kernel."""
    scale: float | Tensor = _factor(adapter)
    if (choice := _choice(adapter)) is not None:
        scale = per_column(tuple(scale * own for own in choice.scales), choice.ranks, adapter.b.dtype, adapter.b.device)
    return torch.mul(adapter.b, scale, out=torch.empty_like(adapter.b, dtype=dtype))


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _row_major(matrix: Tensor) -> Tensor:
    """With unit stride along its rows; a gradient that autograd has expanded is not."""
    return matrix if matrix.stride(-1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()
