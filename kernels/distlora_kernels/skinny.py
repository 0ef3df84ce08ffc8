"""Compute the products of an adapter (rank R, far below I and O) around its linear: matrices with one skinny side.

Each product reads the large operand once:

    down   xa  = d(x) a^T                            forward, one product for all linears of an input (a stacked)
    up     y   = xa b^T + bias, or d(dxa a)          the base GEMM of forward or dX then accumulates into it
    dy     dxa = dy b,  db = scale * dy^T xa         backward, dy read once for both (skinny_launch.py has the
    exception) grad   da  = dxa^T d(x)

d zeroes the dropped inputs (dropout.py). With a choice the adapters lie side by side (rows of a, columns of b), and xa
and dxa are compact: row m has the columns of its adapter, then zeros up to the largest rank; all zeros for -1. A
non-finite value in one adapter's rows then reaches no other adapter's gradient, and each adapter may have its dropout.
Sums are fp32 (fp64 for fp64 inputs), rounded once, in a fixed order: equal inputs give equal bits.

Letters: M rows, I in features, O out features, R rank (of all adapters together), N adapters, B rows of the batch.
Dense tensors may be slices of wider ones. The torch operations of this file are the definition; they run on the CPU,
and in fp64 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distlora_kernels.dispatch import on_device_of, uses_triton
from distlora_kernels.dropout import ChosenDropout, Dropout, dropped
from distlora_kernels.operands import RowChoice, per_column

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def skinny_down(
    x: Tensor,
    a: Tensor,
    *,
    choice: RowChoice | None = None,
    dropout: Dropout | ChosenDropout | None = None,
    out: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """Return xa = d(x) a^T, (M, R) in x's dtype, of x (M, I) and a (R, I); (M, max(ranks)) with a choice.

    Without choice and dropout xa is written to `out` and x to `copy`, if they are given: columns of a wider matrix.
    """
    _check(x, a, rank=a.shape[0], choice=choice, dropout=dropout)
    assert x.shape[1] == a.shape[1], f"x {tuple(x.shape)}, a {tuple(a.shape)}"
    if _in_triton(x):
        from distlora_kernels import skinny_launch

        with on_device_of(x):
            return skinny_launch.down(x, a, choice, dropout, out, copy)
    seen = _zeroed(x, dropout)
    if choice is None:
        return _placed(seen @ a.T, x, out, copy)
    xa = x.new_zeros(x.shape[0], max(choice.ranks))
    for part, columns, rank in _adapter_parts(choice, x.shape[0]):
        xa[part, :rank] = seen[part] @ a[columns].T
    return xa


def skinny_up(
    xa: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    choice: RowChoice | None = None,
    dropout: Dropout | ChosenDropout | None = None,
) -> Tensor:
    """Return xa b^T + bias, (M, O) in xa's dtype, of xa (M, R) and b (O, R) of any strides.

    xa is (M, max(ranks)) with a choice. The term of dX is skinny_up(dxa, a.T, dropout=...), a (R, I): the dropout then
    applies to the result, without bias.
    """
    _check(xa, b, rank=b.shape[1], choice=choice, dropout=dropout)
    _check_columns(xa, b.shape[1], choice)
    if bias is not None:
        assert dropout is None, "skinny_up takes a bias or a dropout of its result, not both"
        assert bias.shape == b.shape[:1], f"bias {tuple(bias.shape)}, b {tuple(b.shape)}"
        assert bias.dtype == xa.dtype, f"bias {bias.dtype}, xa {xa.dtype}"
    if _in_triton(xa):
        from distlora_kernels import skinny_launch

        with on_device_of(xa):
            return skinny_launch.up(xa, b, bias, choice, dropout)
    if choice is None:
        return _zeroed(xa @ b.T, dropout) if bias is None else torch.addmm(bias, xa, b.T)
    y = xa.new_zeros(xa.shape[0], b.shape[0]) if bias is None else bias.expand(xa.shape[0], -1).contiguous()
    for part, columns, rank in _adapter_parts(choice, xa.shape[0]):
        y[part] = torch.addmm(y[part], xa[part, :rank], b[:, columns].T)
    return _zeroed(y, dropout)


def skinny_dy(
    dy: Tensor,
    b: Tensor,
    xa: Tensor,
    *,
    scale: float,
    choice: RowChoice | None = None,
    out: Tensor | None = None,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dxa = dy b, (M, R) in dy's dtype, and db = scale * dy^T xa, (O, R) fp32.

    Shapes: dy (M, O), b (O, R), xa (M, R). b includes the adapter's scale; `scale` (times choice.scales with a choice)
    is for the master's gradient. With a choice xa and dxa are (M, max(ranks)). Without one dxa is written to `out` and
    dy to `copy`, if they are given: columns of a wider matrix.
    """
    _check(dy, b, xa, rank=b.shape[1], choice=choice)
    _check_columns(xa, b.shape[1], choice)
    assert dy.shape == (xa.shape[0], b.shape[0]), f"dy {tuple(dy.shape)}, b {tuple(b.shape)}, xa {tuple(xa.shape)}"
    if _in_triton(dy):
        from distlora_kernels import skinny_launch

        with on_device_of(dy):
            return skinny_launch.dy(dy, b, xa, scale, choice, out=out, copy=copy)[:2]
    wide = _wide(dy)
    if choice is None:
        return _placed(dy @ b, dy, out, copy), (dy.T.to(wide) @ xa.to(wide)).mul_(scale)
    dxa = dy.new_zeros(dy.shape[0], max(choice.ranks))
    db = torch.zeros(b.shape, dtype=wide, device=b.device)
    for part, columns, rank in _adapter_parts(choice, dy.shape[0]):
        dxa[part, :rank] = dy[part] @ b[:, columns]
        db[:, columns] += dy[part].T.to(wide) @ xa[part, :rank].to(wide)
    return dxa, db.mul_(per_column(tuple(scale * each for each in choice.scales), choice.ranks, wide, b.device))


def skinny_grad(
    dxa: Tensor, x: Tensor, *, choice: RowChoice | None = None, dropout: Dropout | ChosenDropout | None = None
) -> Tensor:
    """Return da = dxa^T d(x), (R, I) fp32, of dxa (M, R) and x (M, I); dxa is (M, max(ranks)) with a choice."""
    rank = dxa.shape[1] if choice is None else sum(choice.ranks)
    _check(dxa, x, rank=rank, choice=choice, dropout=dropout)
    _check_columns(dxa, rank, choice)
    assert dxa.shape[0] == x.shape[0], f"dxa {tuple(dxa.shape)}, x {tuple(x.shape)}"
    if _in_triton(x):
        from distlora_kernels import skinny_launch

        with on_device_of(x):
            return skinny_launch.grad(dxa, x, choice, dropout)
    wide = _wide(x)
    seen = _zeroed(x, dropout)
    if choice is None:
        return dxa.T.to(wide) @ seen.to(wide)
    da = torch.zeros(rank, x.shape[1], dtype=wide, device=x.device)
    for part, columns, rank in _adapter_parts(choice, x.shape[0]):
        da[columns] += dxa[part, :rank].T.to(wide) @ seen[part].to(wide)
    return da


def _check(
    *operands: Tensor,
    rank: int,
    choice: RowChoice | None,
    dropout: Dropout | ChosenDropout | None = None,
) -> None:
    """Assert that operands are matrices of one dtype that fit their choice and dropout; the first has the M rows."""
    sizes = [(tuple(tensor.shape), tensor.dtype) for tensor in operands]
    assert all(tensor.dim() == 2 and tensor.numel() for tensor in operands), sizes
    assert operands[0].dtype in _DTYPES, sizes
    assert all(tensor.dtype == operands[0].dtype for tensor in operands), sizes
    num_rows = operands[0].shape[0]
    if choice is not None:
        assert num_rows % choice.rows.shape[0] == 0, f"{num_rows} inputs of {choice.rows.shape[0]} rows"
        assert sum(choice.ranks) == rank, f"ranks {choice.ranks}, {rank} altogether"
    if dropout is not None:
        assert num_rows % dropout.rows.shape[0] == 0, f"{num_rows} inputs of {dropout.rows.shape[0]} sequences"
    if isinstance(dropout, ChosenDropout):
        assert choice is not None, "a ChosenDropout needs a RowChoice"
        assert len(dropout.streams) == len(choice.ranks), f"{len(dropout.streams)} of {len(choice.ranks)} adapters"


def _placed(product: Tensor, rows: Tensor, out: Tensor | None, copy: Tensor | None) -> Tensor:
    if copy is not None:
        copy.copy_(rows)
    return product if out is None else out.copy_(product)


def _check_columns(compact: Tensor, rank: int, choice: RowChoice | None) -> None:
    columns = rank if choice is None else max(choice.ranks)
    assert compact.shape[1] == columns, f"{tuple(compact.shape)} for a rank of {columns}"


def _in_triton(tensor: Tensor) -> bool:
    """Return whether the kernels run. They add in fp32, so fp64 uses torch on a GPU too."""
    return uses_triton(tensor) and tensor.dtype != torch.float64


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zeroed(x: Tensor, dropout: Dropout | ChosenDropout | None) -> Tensor:
    return x if dropout is None else x.masked_fill(dropped(dropout, *x.shape), 0)


def _adapter_parts(choice: RowChoice, num_rows: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield (inputs, columns of b, rank) of each row of the batch that uses an adapter."""
    tokens = num_rows // choice.rows.shape[0]
    for row, adapter in enumerate(choice.rows.tolist()):
        assert -1 <= adapter < len(choice.ranks), f"row {row} has adapter {adapter} of {len(choice.ranks)}"
        if adapter >= 0:
            yield slice(row * tokens, (row + 1) * tokens), choice.columns(adapter), choice.ranks[adapter]
