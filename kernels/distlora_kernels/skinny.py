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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distlora_kernels.dispatch import check, register, uses_triton
from distlora_kernels.dropout import ChosenDropout, Dropout, Stream, dropped
from distlora_kernels.operands import RowChoice, columns_of, per_column

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def skinny_down(
    x: Tensor, a: Tensor, *, choice: RowChoice | None = None, dropout: Dropout | ChosenDropout | None = None
) -> Tensor:
    """Return xa = d(x) a^T, (M, R) in x's dtype, of x (M, I) and a (R, I); (M, max(ranks)) with a choice.

    Raises RuntimeError for shapes or dtypes that do not fit.
    """
    _check_operands("skinny_down", x=x, a=a)
    check(
        x.shape[1] == a.shape[1], lambda: f"x has {x.shape[1]} features, a is made for {a.shape[1]}: {tuple(a.shape)}"
    )
    _check_choice(choice, x.shape[0], a.shape[0])
    return _down(x, a, *_choice_arguments(choice), *_dropout_arguments(dropout, choice, x.shape[0]))


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
    applies to the result, without bias. Raises RuntimeError for shapes or dtypes that do not fit.
    """
    _check_operands("skinny_up", xa=xa, b=b)
    _check_choice(choice, xa.shape[0], b.shape[1])
    _check_rank("xa", xa, b.shape[1], choice)
    check(
        bias is None or (bias.shape == b.shape[:1] and bias.dtype == xa.dtype),
        lambda: f"the bias of {b.shape[0]} {xa.dtype} outputs is {tuple(bias.shape)} {bias.dtype}",  # type: ignore[union-attr]
    )
    check(bias is None or dropout is None, lambda: "skinny_up takes a bias or a dropout of its result, not both")
    return _up(xa, b, bias, *_choice_arguments(choice), *_dropout_arguments(dropout, choice, xa.shape[0]))


def skinny_dy(
    dy: Tensor, b: Tensor, xa: Tensor, *, scale: float, choice: RowChoice | None = None
) -> tuple[Tensor, Tensor]:
    """Return dxa = dy b, (M, R) in dy's dtype, and db = scale * dy^T xa, (O, R) fp32.

    Shapes: dy (M, O), b (O, R), xa (M, R). b includes the adapter's scale; `scale` (times choice.scales with a choice)
    is for the master's gradient. With a choice xa and dxa are (M, max(ranks)). Raises RuntimeError for shapes or dtypes
    that do not fit.
    """
    _check_operands("skinny_dy", dy=dy, b=b, xa=xa)
    check(dy.shape[1] == b.shape[0], lambda: f"dy has {dy.shape[1]} features, b gives {b.shape[0]}: {tuple(b.shape)}")
    check(xa.shape[0] == dy.shape[0], lambda: f"dy has {dy.shape[0]} rows, xa {xa.shape[0]}")
    _check_choice(choice, dy.shape[0], b.shape[1])
    _check_rank("xa", xa, b.shape[1], choice)
    return _dy(dy, b, xa, scale, *_choice_arguments(choice), () if choice is None else choice.scales)


def skinny_grad(
    dxa: Tensor, x: Tensor, *, choice: RowChoice | None = None, dropout: Dropout | ChosenDropout | None = None
) -> Tensor:
    """Return da = dxa^T d(x), (R, I) fp32, of dxa (M, R) and x (M, I); dxa is (M, max(ranks)) with a choice.

    Raises RuntimeError for shapes or dtypes that do not fit.
    """
    _check_operands("skinny_grad", dxa=dxa, x=x)
    check(dxa.shape[0] == x.shape[0], lambda: f"x has {x.shape[0]} rows, dxa {dxa.shape[0]}")
    rank = dxa.shape[1] if choice is None else sum(choice.ranks)
    _check_choice(choice, x.shape[0], rank)
    _check_rank("dxa", dxa, rank, choice)
    return _grad(dxa, x, *_choice_arguments(choice), *_dropout_arguments(dropout, choice, x.shape[0]))


def _check_operands(op: str, **operands: Tensor) -> None:
    first = next(iter(operands.values()))
    for name, tensor in operands.items():
        check(tensor.dim() == 2, lambda: f"{op} takes matrices; {name} is {tuple(tensor.shape)}")  # noqa: B023
        check(
            tensor.dtype == first.dtype and tensor.dtype in _DTYPES,
            lambda: f"{op} takes operands of one float dtype; got {[t.dtype for t in operands.values()]}",
            TypeError,
        )
        check(0 not in tensor.shape, lambda: f"{op} takes no empty {name}: {tuple(tensor.shape)}")  # noqa: B023


def _check_rank(name: str, compact: Tensor, rank: int, choice: RowChoice | None) -> None:
    columns = rank if choice is None else max(choice.ranks)
    check(compact.shape[1] == columns, lambda: f"{name} has {compact.shape[1]} columns for a rank of {columns}")


def _check_choice(choice: RowChoice | None, num_rows: int, rank: int) -> None:
    if choice is None:
        return
    check(
        choice.rows.dtype == torch.int64 and choice.rows.dim() == 1 and num_rows % choice.rows.shape[0] == 0,
        lambda: f"{num_rows} inputs do not split over rows {tuple(choice.rows.shape)} of {choice.rows.dtype}",
    )
    check(
        sum(choice.ranks) == rank and len(choice.scales) == len(choice.ranks),
        lambda: f"ranks {choice.ranks} and scales {choice.scales} do not fit a rank of {rank} altogether",
    )


def _choice_arguments(choice: RowChoice | None) -> tuple[Tensor | None, Sequence[int]]:
    return (None, ()) if choice is None else (choice.rows, choice.ranks)


def _dropout_arguments(
    dropout: Dropout | ChosenDropout | None, choice: RowChoice | None, num_rows: int
) -> tuple[Tensor | None, Tensor | None, Sequence[int]]:
    """Return a dropout as the schema's arguments: rows, steps (ChosenDropout only) and numbers.

    The numbers are the first position, then key, threshold and step, or key and threshold of each adapter.
    """
    if dropout is None:
        return None, None, ()
    batch = dropout.rows.shape[0]
    check(num_rows % batch == 0, lambda: f"{num_rows} inputs are not {batch} sequences of equal length")
    if isinstance(dropout, Dropout):
        return dropout.rows, None, (dropout.first, *dropout.key, dropout.threshold, dropout.step)
    check(
        choice is not None
        and len(dropout.streams) == len(choice.ranks)
        and choice.rows.shape == dropout.steps.shape == dropout.rows.shape,
        lambda: f"a ChosenDropout of {len(dropout.streams)} adapters needs a choice among as many",
    )
    return dropout.rows, dropout.steps, (dropout.first, *(n for key, bound in dropout.streams for n in (*key, bound)))


def _dropout(
    dropped_rows: Tensor | None, steps: Tensor | None, numbers: Sequence[int], rows: Tensor | None
) -> Dropout | ChosenDropout | None:
    if dropped_rows is None:
        return None
    first, *numbers = numbers
    if steps is None:
        return Dropout((numbers[0], numbers[1]), numbers[2], numbers[3], dropped_rows, first)
    assert rows is not None
    streams = tuple(Stream((key0, key1), bound) for key0, key1, bound in zip(*[iter(numbers)] * 3, strict=True))
    return ChosenDropout(streams, rows, steps, dropped_rows, first)


def _num_columns(rank: int, ranks: Sequence[int]) -> int:
    return max(ranks) if ranks else rank


@register(
    "skinny_down(Tensor x, Tensor a, Tensor? rows, int[] ranks, Tensor? dropped_rows, Tensor? steps,"
    " int[] dropout) -> Tensor",
    fake=lambda x, a, _, ranks, *_others: x.new_empty(x.shape[0], _num_columns(a.shape[0], ranks)),
)
def _down(
    x: Tensor,
    a: Tensor,
    rows: Tensor | None,
    ranks: Sequence[int],
    dropped_rows: Tensor | None,
    steps: Tensor | None,
    numbers: Sequence[int],
) -> Tensor:
    dropout = _dropout(dropped_rows, steps, numbers, rows)
    if _in_triton(x):
        from distlora_kernels import skinny_launch

        return skinny_launch.down(x, a, rows, tuple(ranks), dropout)
    seen = _zeroed(x, dropout)
    if rows is None:
        return seen @ a.T
    xa = x.new_zeros(x.shape[0], max(ranks))
    for part, columns, rank in _adapter_parts(rows, ranks, x.shape[0]):
        xa[part, :rank] = seen[part] @ a[columns].T
    return xa


@register(
    "skinny_up(Tensor xa, Tensor b, Tensor? bias, Tensor? rows, int[] ranks, Tensor? dropped_rows, Tensor? steps,"
    " int[] dropout)"
    " -> Tensor",
    fake=lambda xa, b, *_others: xa.new_empty(xa.shape[0], b.shape[0]),
)
def _up(
    xa: Tensor,
    b: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    ranks: Sequence[int],
    dropped_rows: Tensor | None,
    steps: Tensor | None,
    numbers: Sequence[int],
) -> Tensor:
    dropout = _dropout(dropped_rows, steps, numbers, rows)
    if _in_triton(xa):
        from distlora_kernels import skinny_launch

        return skinny_launch.up(xa, b, bias, rows, tuple(ranks), dropout)
    if rows is None:
        return _zeroed(xa @ b.T, dropout) if bias is None else torch.addmm(bias, xa, b.T)
    y = xa.new_zeros(xa.shape[0], b.shape[0]) if bias is None else bias.expand(xa.shape[0], -1).contiguous()
    for part, columns, rank in _adapter_parts(rows, ranks, xa.shape[0]):
        y[part] = torch.addmm(y[part], xa[part, :rank], b[:, columns].T)
    return _zeroed(y, dropout)


@register(
    "skinny_dy(Tensor dy, Tensor b, Tensor xa, float scale, Tensor? rows, int[] ranks, float[] scales)"
    " -> (Tensor, Tensor)",
    fake=lambda _, b, xa, *_others: (
        torch.empty_like(xa, memory_format=torch.contiguous_format),
        b.new_empty(b.shape, dtype=_wide(b)),
    ),
)
def _dy(
    dy: Tensor,
    b: Tensor,
    xa: Tensor,
    scale: float,
    rows: Tensor | None,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> tuple[Tensor, Tensor]:
    if _in_triton(dy):
        from distlora_kernels import skinny_launch

        return skinny_launch.dy(dy, b, xa, scale, rows, tuple(ranks), tuple(scales))[:2]
    wide = _wide(dy)
    if rows is None:
        return dy @ b, (dy.T.to(wide) @ xa.to(wide)).mul_(scale)
    dxa = dy.new_zeros(dy.shape[0], max(ranks))
    db = torch.zeros(b.shape, dtype=wide, device=b.device)
    for part, columns, rank in _adapter_parts(rows, ranks, dy.shape[0]):
        dxa[part, :rank] = dy[part] @ b[:, columns]
        db[:, columns] += dy[part].T.to(wide) @ xa[part, :rank].to(wide)
    return dxa, db.mul_(per_column(tuple(scale * each for each in scales), tuple(ranks), wide, b.device))


@register(
    "skinny_grad(Tensor dxa, Tensor x, Tensor? rows, int[] ranks, Tensor? dropped_rows, Tensor? steps,"
    " int[] dropout) -> Tensor",
    fake=lambda dxa, x, _, ranks, *_others: x.new_empty(
        sum(ranks) if ranks else dxa.shape[1], x.shape[1], dtype=_wide(x)
    ),
)
def _grad(
    dxa: Tensor,
    x: Tensor,
    rows: Tensor | None,
    ranks: Sequence[int],
    dropped_rows: Tensor | None,
    steps: Tensor | None,
    numbers: Sequence[int],
) -> Tensor:
    dropout = _dropout(dropped_rows, steps, numbers, rows)
    if _in_triton(x):
        from distlora_kernels import skinny_launch

        return skinny_launch.grad(dxa, x, rows, tuple(ranks), dropout)
    wide = _wide(x)
    seen = _zeroed(x, dropout)
    if rows is None:
        return dxa.T.to(wide) @ seen.to(wide)
    da = torch.zeros(sum(ranks), x.shape[1], dtype=wide, device=x.device)
    for part, columns, rank in _adapter_parts(rows, ranks, x.shape[0]):
        da[columns] += dxa[part, :rank].T.to(wide) @ seen[part].to(wide)
    return da


def _in_triton(tensor: Tensor) -> bool:
    """Return whether the kernels run. They add in fp32, so fp64 uses torch on a GPU too."""
    return uses_triton(tensor) and tensor.dtype != torch.float64


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zeroed(x: Tensor, dropout: Dropout | ChosenDropout | None) -> Tensor:
    return x if dropout is None else x.masked_fill(dropped(dropout, *x.shape), 0)


def _adapter_parts(rows: Tensor, ranks: Sequence[int], num_rows: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield (inputs, columns of b, rank) of each row of the batch that uses an adapter."""
    tokens = num_rows // rows.shape[0]
    for row, adapter in enumerate(rows.tolist()):
        assert -1 <= adapter < len(ranks), f"row {row} has adapter {adapter} of {len(ranks)}"
        if adapter >= 0:
            yield slice(row * tokens, (row + 1) * tokens), columns_of(adapter, ranks), ranks[adapter]
