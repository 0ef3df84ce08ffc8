"""Compute the products of an adapter (rank R, far below I and O) around its linear: matrices with one skinny side.

Each product reads the large operand once:

    down   xa  = d(x) a^T                            forward, one product for all linears of an input (a stacked)
    up     y   = xa b^T + bias, or d(dxa a)          the base GEMM of forward or dX then accumulates into it
    dy     dxa = dy b,  db = scale * dy^T xa         backward, dy read once for both (`dy_products` has the
    exception) grad   da  = dxa^T d(x)

d zeroes the dropped inputs (dropout.py). With a choice the adapters lie side by side (rows of a, columns of b), and xa
and dxa are compact: row m has the columns of its adapter, then zeros up to the largest rank; all zeros for -1. A
non-finite value in one adapter's rows then reaches no other adapter's gradient, and each adapter may have its dropout.
Sums are fp32, rounded once, in a fixed order: equal inputs give equal bits.

Letters: M rows, I in features, O out features, R rank (of all adapters together), N adapters, B rows of the batch.
Dense tensors may be slices of wider ones. This file chooses tiles, splits and buffers of partial sums for the kernels
of skinny_triton.py; docs/benchmarks.md has their predicted costs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from distlora_kernels.buffers import GROUP, PROGRAMS, reads_once, split, split_over_rows, tile_of
from distlora_kernels.dispatch import on_device, on_device_of
from distlora_kernels.dropout import ChosenDropout, Dropout, stream_table
from distlora_kernels.operands import RowChoice, counters
from distlora_kernels.skinny_triton import down_kernel, dy_kernel, grad_kernel, up_kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def skinny_down(
    x: Tensor,
    a: Tensor,
    *,
    choice: RowChoice | None = None,
    dropout: Dropout | ChosenDropout | None = None,
    wide: Tensor | None = None,
) -> Tensor:
    """Return xa = d(x) a^T, (M, R) in x's dtype, of x (M, I) and a (R, I); (M, max(ranks)) with a choice.

    Without choice and dropout, [x | xa] is also written to `wide` (M, I + R) if it is given.
    """
    _check(x, a, rank=a.shape[0], choice=choice, dropout=dropout)
    assert x.shape[1] == a.shape[1], f"x {tuple(x.shape)}, a {tuple(a.shape)}"
    copy, beside = (None, None) if wide is None else wide.split(list(a.shape[::-1]), dim=1)
    with on_device_of(x):
        return _down(x, a, choice, dropout, copy=copy, beside=beside)


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
    with on_device_of(xa):
        return _up(xa, b, bias, choice, dropout)


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
    with on_device_of(dy):
        return dy_products(dy, b, xa, scale, choice, out=out, copy=copy)[:2]


def skinny_grad(
    dxa: Tensor, x: Tensor, *, choice: RowChoice | None = None, dropout: Dropout | ChosenDropout | None = None
) -> Tensor:
    """Return da = dxa^T d(x), (R, I) fp32, of dxa (M, R) and x (M, I); dxa is (M, max(ranks)) with a choice."""
    rank = dxa.shape[1] if choice is None else sum(choice.ranks)
    _check(dxa, x, rank=rank, choice=choice, dropout=dropout)
    _check_columns(dxa, rank, choice)
    assert dxa.shape[0] == x.shape[0], f"dxa {tuple(dxa.shape)}, x {tuple(x.shape)}"
    with on_device_of(x):
        return _grad(dxa, x, choice, dropout)


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


def _check_columns(compact: Tensor, rank: int, choice: RowChoice | None) -> None:
    columns = rank if choice is None else max(choice.ranks)
    assert compact.shape[1] == columns, f"{tuple(compact.shape)} for a rank of {columns}"


class _Rows(NamedTuple):
    """The choice of adapters as the kernels take it."""

    batch: int
    tokens: int
    rank: int
    """Largest rank of an adapter: the columns of xa and dxa."""
    rows: Tensor | None = None
    """(B,) int64: adapter of each row."""
    spans: Tensor | None = None
    """(N, 2) int32: first column and rank of each adapter."""
    alignment: int = 16
    """Largest power of 2, up to 16, that divides every rank and first column."""


def _rows_of(num_rows: int, rank: int, choice: RowChoice | None) -> _Rows:
    if choice is None:
        return _Rows(1, num_rows, rank)
    rows, ranks = choice.rows, choice.ranks
    alignment = min(rank & -rank for rank in (16, *ranks))
    batch = rows.shape[0]
    return _Rows(batch, num_rows // batch, max(ranks), rows, _spans(ranks, rows.device), alignment)


@functools.lru_cache(maxsize=1024)
def _spans(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([(sum(ranks[:n]), rank) for n, rank in enumerate(ranks)], dtype=torch.int32, device=device)


def _number(choice: RowChoice | None) -> int:
    return 1 if choice is None else len(choice.ranks)


def _scales_of(choice: RowChoice | None, device: torch.device) -> Tensor | None:
    return None if choice is None else on_device(choice.scales, device)


def _dropout_words(dropout: Dropout | ChosenDropout | None, num_rows: int) -> dict[str, Any]:
    absent = dict.fromkeys(("dropped_rows", "streams", "steps"))
    words = dict.fromkeys(("dropped_tokens", "first_token", "key0", "key1", "threshold", "step"), 0)
    if dropout is None:
        return absent | words
    words |= {"dropped_tokens": num_rows // dropout.rows.shape[0], "first_token": dropout.first}
    if isinstance(dropout, ChosenDropout):
        streams = stream_table(dropout.streams, dropout.rows.device)
        return words | {"dropped_rows": dropout.rows, "streams": streams, "steps": dropout.steps}
    # Signed, so that Triton takes every word as an int32.
    signed = {"key0": dropout.key[0], "key1": dropout.key[1], "step": dropout.step}
    signed = {name: (word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000 for name, word in signed.items()}
    return absent | words | signed | {"dropped_rows": dropout.rows, "threshold": dropout.threshold}


def _row_contiguous(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy with contiguous rows."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _down(
    x: Tensor,
    a: Tensor,
    choice: RowChoice | None,
    dropout: Dropout | ChosenDropout | None,
    *,
    out: Tensor | None = None,
    copy: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """Return skinny_down; a may have any strides. xa is written to `out`, x to `copy` and xa to `beside`, if given."""
    x = _row_contiguous(x)
    (num_rows, num_columns), by = x.shape, _rows_of(x.shape[0], a.shape[0], choice)
    tile = tile_of("down", by.rank, by.tokens, x.itemsize, dropout is not None, copies=copy is not None)
    tiles_of_a_row, pieces = triton.cdiv(by.tokens, tile.rows), triton.cdiv(by.rank, tile.ranks)
    programs = by.batch * tiles_of_a_row * pieces
    share = split(num_columns, tile.columns, programs)
    out = x.new_empty(num_rows, by.rank) if out is None else out
    parts = None
    if share.parts > 1:
        parts = out.new_empty(share.parts, num_rows, pieces * tile.ranks, dtype=torch.float32)
    down_kernel[(programs, share.parts)](
        x, a, out, copy, beside, parts, None if parts is None else counters(x.device, programs), by.rows, by.spans,
        tokens=by.tokens, num_columns=num_columns, num_ranks=by.rank,
        stride_x=x.stride(0), stride_ar=a.stride(0), stride_ai=a.stride(1), stride_out=out.stride(0),
        stride_copy=None if copy is None else copy.stride(0), stride_split=num_rows * pieces * tile.ranks,
        split_columns=share.size, tiles_of_a_row=tiles_of_a_row, **_dropout_words(dropout, num_rows),
        BM=tile.rows, BK=tile.columns, BR=tile.ranks, PIECES=pieces, SPAN_ALIGNMENT=by.alignment,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _up(
    xa: Tensor,
    b: Tensor,
    bias: Tensor | None,
    choice: RowChoice | None,
    dropout: Dropout | ChosenDropout | None,
) -> Tensor:
    """Return skinny_up."""
    xa = _row_contiguous(xa)
    num_rows, num_columns = xa.shape[0], b.shape[0]
    by = _rows_of(num_rows, b.shape[1], choice)
    tile = tile_of("up", by.rank, by.tokens, xa.itemsize, dropout is not None)
    tiles_of_a_row, column_tiles = triton.cdiv(by.tokens, tile.rows), triton.cdiv(num_columns, tile.columns)
    out = xa.new_empty(num_rows, num_columns)
    up_kernel[(by.batch * tiles_of_a_row * column_tiles,)](
        xa, b, bias, out, by.rows, by.spans, tokens=by.tokens, num_columns=num_columns, num_ranks=by.rank,
        stride_xa=xa.stride(0), stride_bo=b.stride(0), stride_br=b.stride(1),
        tiles_of_a_row=tiles_of_a_row, column_tiles=column_tiles, **_dropout_words(dropout, num_rows),
        BM=tile.rows, BN=tile.columns, BR=tile.ranks, PIECES=triton.cdiv(by.rank, tile.ranks),
        SPAN_ALIGNMENT=by.alignment, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def dy_products(
    dy: Tensor,
    b: Tensor,
    xa: Tensor,
    scale: float,
    choice: RowChoice | None,
    *,
    y: Tensor | None = None,
    out: Tensor | None = None,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return skinny_dy, and with y (M, O) the sums of dy * y by stripe of rows, (stripes, O) fp32.

    The sums are None if another kernel must read dy again for them.
    """
    dy, b, xa = _row_contiguous(dy), _row_contiguous(b), _row_contiguous(xa)
    (num_rows, num_columns), by = dy.shape, _rows_of(dy.shape[0], b.shape[1], choice)
    tile = tile_of("dy", by.rank, by.tokens, dy.itemsize)
    stripes_of_a_row = triton.cdiv(by.tokens, tile.rows)
    stripes = by.batch * stripes_of_a_row
    if not reads_once(stripes, num_columns, by.rank):
        db = b.new_empty(b.shape, dtype=torch.float32)
        _products_over_rows(xa, dy, db.T, choice, None, scale)
        return _down(dy, b.T, choice, None, out=out, copy=copy), db, None
    # Two programs per multiprocessor: one waits for its tile while the other multiplies.
    share = split(num_columns, tile.columns, stripes, wanted=2 * PROGRAMS)
    dxa = dy.new_empty(num_rows, by.rank) if out is None else out
    parts = None
    if share.parts > 1:
        parts = dxa.new_empty(share.parts, num_rows, tile.ranks, dtype=torch.float32)
    db = b.new_empty(b.shape, dtype=torch.float32)
    db_parts = db.new_empty(stripes, num_columns, tile.ranks)
    group = GROUP if choice is None and stripes > GROUP else 1
    scales = _scales_of(choice, dy.device)
    # At 32 ranks a tile of y does not fit the registers of sm_80.
    y = None if y is None or tile.ranks > 16 else _row_contiguous(y)
    products = None if y is None else b.new_empty(stripes, num_columns, dtype=torch.float32)
    dy_kernel[(stripes, share.parts)](
        dy, b, xa, dxa, db, copy, y, products, parts, db_parts,
        counters(dy.device, stripes + (triton.cdiv(stripes, group) + 1) * share.parts), by.rows, by.spans, scales,
        tokens=by.tokens, num_columns=num_columns, num_ranks=by.rank, stride_dy=dy.stride(0), stride_b=b.stride(0),
        stride_xa=xa.stride(0), stride_out=dxa.stride(0), stride_copy=None if copy is None else copy.stride(0),
        stride_y=0 if y is None else y.stride(0), stride_split=num_rows * tile.ranks, stride_db=db.stride(0),
        num_adapters=_number(choice), scale=scale, split_columns=share.size, stripes_of_a_row=stripes_of_a_row,
        BM=tile.rows, BK=tile.columns, BR=tile.ranks, GROUP=group, SPAN_ALIGNMENT=by.alignment,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return dxa, db, products


def _grad(dxa: Tensor, x: Tensor, choice: RowChoice | None, dropout: Dropout | ChosenDropout | None) -> Tensor:
    """Return skinny_grad."""
    da = x.new_empty(dxa.shape[1] if choice is None else sum(choice.ranks), x.shape[1], dtype=torch.float32)
    _products_over_rows(_row_contiguous(dxa), _row_contiguous(x), da, choice, dropout, None)
    return da


def _products_over_rows(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    choice: RowChoice | None,
    dropout: Dropout | ChosenDropout | None,
    scale: float | None,
) -> None:
    """Compute out = scale * left^T d(right) of left (M, R), right (M, I); `scale` None is without choice.scales.

    out is (R, I) fp32 of any strides.
    """
    (num_rows, num_columns), by = right.shape, _rows_of(right.shape[0], left.shape[1], choice)
    tile = tile_of("grad", by.rank, by.tokens, right.itemsize, dropout is not None)
    column_tiles, pieces = triton.cdiv(num_columns, tile.columns), triton.cdiv(by.rank, tile.ranks)
    stripe = split_over_rows(tile, by.tokens, num_columns, by.rank, by.batch)
    stripes = by.batch * stripe.parts
    parts = None if stripes == 1 and choice is None else out.new_empty(stripes, by.rank, num_columns)
    scales = None if scale is None else _scales_of(choice, out.device)
    grad_kernel[(column_tiles * pieces, stripes)](
        left, right, out, parts, None if parts is None else counters(out.device, column_tiles * pieces),
        by.rows, by.spans, scales, tokens=by.tokens, num_columns=num_columns, num_ranks=by.rank,
        stride_dxa=left.stride(0), stride_x=right.stride(0), stride_or=out.stride(0), stride_oi=out.stride(1),
        num_adapters=_number(choice), scale=1.0 if scale is None else scale,
        stripe_tokens=stripe.size, stripes_of_a_row=stripe.parts, **_dropout_words(dropout, num_rows),
        BM=tile.rows, BN=tile.columns, BR=tile.ranks, PIECES=pieces, SPAN_ALIGNMENT=by.alignment,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
