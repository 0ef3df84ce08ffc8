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

from distlora_kernels import variants
from distlora_kernels.fused import fused_linear, fused_linear_dx
from distlora_kernels.operands import Adapter, Gradients, Linear, Needs, RowChoice, per_column
from distlora_kernels.scratch import DenseWeights
from distlora_kernels.skinny import skinny_down, skinny_dy, skinny_grad, skinny_up


def forward(x: Tensor, linears: Sequence[Linear], weights: DenseWeights) -> tuple[list[Tensor], list[Tensor | None]]:
    """x (M, I) -> each linear's y (M, O), and what its backward keeps: x A^T (M, R), compact where rows choose."""
    x = _row_major(x)
    kept = _project_down(x, linears)
    ys = []
    for index, (linear, xa) in enumerate(zip(linears, kept, strict=True)):
        weight, adapter, bias = linear
        up = None if adapter is None else _scaled_up(adapter, x.dtype)
        choice = _choice(adapter)
        fused = variants.choose(x, weight) == "fused"
        if fused and choice is None:
            ys.append(fused_linear(x, weight, xa=xa, b=up, bias=bias))
            continue
        if xa is None or up is None:
            dense = weights.take(index, weight, x.dtype)
            ys.append(x @ dense.T if bias is None else torch.addmm(bias, x, dense.T))
            continue
        y = skinny_up(xa, up, bias=bias, choice=choice)
        if fused:
            y = fused_linear(x, weight, addend=y)
        else:
            torch.addmm(y, x, weights.take(index, weight, x.dtype).T, out=y)
        ys.append(y)
    return ys, kept


def backward(
    x: Tensor | None,
    linears: Sequence[Linear],
    weights: DenseWeights,
    kept: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
    needs: Needs,
) -> Gradients:
    """The gradients of the sum of <y, dy> over the linears; x is None where no linear has an adapter."""
    gradients = Gradients(len(linears))
    rows = {index: _row_major(dy) for index, dy in enumerate(dys) if dy is not None}
    dxas: dict[int, Tensor] = {}
    for index, dy in rows.items():
        adapter, xa = linears[index].adapter, kept[index]
        if adapter is not None and xa is not None:
            dxas[index], db = skinny_dy(
                dy, _scaled_up(adapter, dy.dtype), xa, scale=_factor(adapter), choice=_choice(adapter)
            )
            gradients.b[index] = db.to(adapter.b.dtype) if needs.b[index] else None
    if x is not None:
        _add_down_gradients(gradients, _row_major(x), linears, dxas, needs)
    if needs.x:
        gradients.x = _input_gradient(linears, weights, rows, dxas)
    return gradients


def _input_gradient(
    linears: Sequence[Linear], weights: DenseWeights, dys: dict[int, Tensor], dxas: dict[int, Tensor]
) -> Tensor | None:
    """dX (M, I): the adapters' terms first, then the base GEMMs accumulate into them; a fused product adds its own."""
    total: Tensor | None = None
    fused = {index for index, dy in dys.items() if variants.choose(dy, linears[index].weight) == "fused"}
    inside: dict[int, tuple[Tensor, Tensor]] = {}

    def add(part: Tensor) -> None:
        nonlocal total
        total = part if total is None else total.add_(part)

    plain = []
    for index, dxa in dxas.items():
        adapter = linears[index].adapter
        assert adapter is not None
        down = adapter.a.to(dxa.dtype)
        if not _is_plain(adapter):
            add(skinny_up(dxa, down.T, choice=_choice(adapter), dropout=adapter.dropout))
        elif index in fused:
            inside[index] = (dxa, down)
        else:
            plain.append((dxa, down))
    if plain:
        add(skinny_up(_side_by_side([dxa for dxa, _ in plain]), _stacked([a for _, a in plain]).T))
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
    """dA of each linear; x is read once for those that see all of it."""
    plain = []
    for index in (index for index in dxas if needs.a[index]):
        adapter = linears[index].adapter
        assert adapter is not None
        if _is_plain(adapter):
            plain.append((index, adapter.a.dtype))
        else:
            da = skinny_grad(dxas[index], x, choice=_choice(adapter), dropout=adapter.dropout)
            gradients.a[index] = da.to(adapter.a.dtype)
    if plain:
        stacked = skinny_grad(_side_by_side([dxas[index] for index, _ in plain]), x)
        parts = stacked.split([dxas[index].shape[1] for index, _ in plain])
        for (index, dtype), da in zip(plain, parts, strict=True):
            gradients.a[index] = da.to(dtype)


def _project_down(x: Tensor, linears: Sequence[Linear]) -> list[Tensor | None]:
    """x A^T of each linear (M, R); x is read once for those that see all of it."""
    kept: list[Tensor | None] = [None] * len(linears)
    plain = []
    for index, linear in enumerate(linears):
        if (adapter := linear.adapter) is None:
            continue
        down = adapter.a.to(x.dtype)
        if _is_plain(adapter):
            plain.append((index, down))
        else:
            kept[index] = skinny_down(x, down, choice=_choice(adapter), dropout=adapter.dropout)
    if plain:
        together = skinny_down(x, _stacked([down for _, down in plain]))
        for (index, _), xa in zip(plain, together.split([down.shape[0] for _, down in plain], dim=1), strict=True):
            kept[index] = xa
    return kept


def _is_plain(adapter: Adapter) -> bool:
    """Whether all rows use it and it sees all of x, so that its products may be joined with its siblings'."""
    return adapter.dropout is None and not isinstance(adapter.scale, RowChoice)


def _choice(adapter: Adapter | None) -> RowChoice | None:
    return adapter.scale if adapter is not None and isinstance(adapter.scale, RowChoice) else None


def _factor(adapter: Adapter) -> float:
    """What dB is scaled by, beside the scales of a choice."""
    scale = 1.0 if isinstance(adapter.scale, RowChoice) else adapter.scale
    return scale if adapter.dropout is None else scale * adapter.dropout.scale


def _scaled_up(adapter: Adapter, dtype: torch.dtype) -> Tensor:
    """s b (O, R) in `dtype`: multiplied in fp32 and rounded once, by one kernel."""
    scale: float | Tensor = _factor(adapter)
    if (choice := _choice(adapter)) is not None:
        scale = per_column(choice.scales, choice.ranks).to(adapter.b.dtype) * scale
    return torch.mul(adapter.b, scale, out=torch.empty_like(adapter.b, dtype=dtype))


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _row_major(matrix: Tensor) -> Tensor:
    """With unit stride along its rows; a gradient that autograd has expanded is not."""
    return matrix if matrix.stride(-1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()
