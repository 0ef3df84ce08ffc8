"""Run skinny.py's products in Triton, at the speed of reading or writing the one large operand.

If rows choose adapters, a tile never spans two rows of the batch, so a program has one adapter. Sums that several
programs share are written as fp32 partials and added in order by `add_partials`: no atomics. Splits depend on shapes
only, never on the number of multiprocessors, and so do the bits.

Ranks are padded to 16, 32 or 64; larger ones are split into pieces of 64, whose programs are neighbours and find the
large operand in L2. Letters as in skinny.py; BM, BN, BK, BR are a tile's rows, columns, summed length and ranks.

Dropout computes dropout.py's words and masks in the kernel, bit for bit. One call of the generator decides
for 8 columns, so it runs on a tile of (rows, columns / 8) and its words are spread over the columns, 8 neighbours per
thread. In the first two rounds the counter's words are one per row or per column, so a call costs 8 full rounds.
"""

import triton
import triton.language as tl

_SLICES = ["batch_rows", "dropped_rows", "steps"]
"""Arguments that may be slices of tensors; their alignment must not create another specialization."""
_WORDS = ["first_token", "key0", "key1", "threshold", "step"]
"""Arguments that may be any number; they must not create another specialization either."""


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Return four random uint32 words of the counters' broadcast shape: Philox-4x32-10."""
    for _ in tl.static_range(10):
        h0 = tl.umulhi(c0, 0xD2511F53)
        h1 = tl.umulhi(c2, 0xCD9E8D57)
        l0 = c0 * 0xD2511F53
        l1 = c2 * 0xCD9E8D57
        c0 = h1 ^ c1 ^ k0
        c2 = h0 ^ c3 ^ k1
        c1 = l1
        c3 = l0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropped_tile(k0, k1, threshold, step, row, position, first_column, COLUMNS: tl.constexpr):
    """Return (BM, COLUMNS) bool, dropout.dropped of the columns from `first_column` on, a multiple of 8.

    k0, k1 and step are words as int32, threshold an int32, row (BM,) int64 and position (BM,) integers.
    """
    call = first_column // 8 + tl.arange(0, COLUMNS // 8)
    w0, w1, w2, w3 = philox(
        k0.to(tl.uint32, bitcast=True),
        k1.to(tl.uint32, bitcast=True),
        call.to(tl.uint32)[None, :],
        position.to(tl.uint32)[:, None],
        row.to(tl.uint32)[:, None],
        step.to(tl.uint32, bitcast=True),
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)) ^ 0x80008000
    # Signed h < threshold - 2^15 equals unsigned (h ^ 2^15) < threshold, also for 2^16 times both sides with any low
    # half: each half is compared as the high one.
    return tl.interleave(words << 16, words) < (threshold.to(tl.uint32) << 16)


@triton.jit
def _adapter_columns(batch_rows, spans, row, num_ranks, SPAN_ALIGNMENT: tl.constexpr):
    """Return the first column and the rank of the adapter of a row of the batch; (0, 0) for none."""
    if batch_rows is None:
        first = 0
        count = num_ranks
    else:
        adapter = tl.load(batch_rows + row)
        # Dividing and multiplying changes nothing, but lets the compiler load 16 bytes at a time (tl.multiple_of of a
        # loaded number does not in Triton 3.6).
        first = tl.load(spans + 2 * adapter, mask=adapter >= 0, other=0) // SPAN_ALIGNMENT * SPAN_ALIGNMENT
        count = tl.load(spans + 2 * adapter + 1, mask=adapter >= 0, other=0) // SPAN_ALIGNMENT * SPAN_ALIGNMENT
    return first, count


@triton.jit
def _dropout_counter(dropped_rows, tokens, first, m, valid):
    """Return the sequence index and position of each row m (int32, whose division is cheap) of the flattened input."""
    return tl.load(dropped_rows + m // tokens, mask=valid, other=0), m % tokens + first


@triton.jit
def _stream_of(batch_rows, streams, steps, row, key0, key1, threshold, step):
    """Return the dropout's key, threshold and step as int32 words; with `streams` those of the row's adapter.

    For a row without adapter they are arbitrary: nothing is computed.
    """
    if streams is not None:
        at = streams + 3 * tl.maximum(tl.load(batch_rows + row), 0)
        key0 = tl.load(at).to(tl.int32)
        key1 = tl.load(at + 1).to(tl.int32)
        threshold = tl.load(at + 2).to(tl.int32)
        step = tl.load(steps + row).to(tl.int32)
    return key0, key1, threshold, step


@triton.jit(do_not_specialize=_WORDS, do_not_specialize_on_alignment=_SLICES)
def down_kernel(
    x, a, out, copy, batch_rows, spans, dropped_rows, streams, steps,
    tokens, num_columns, num_ranks, stride_x, stride_ar, stride_ai, stride_out, stride_copy, stride_split,
    split_columns, tiles_of_a_row, dropped_tokens, first_token, key0, key1, threshold, step,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PIECES: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute out[split, m, r] = sum of d(x)[m, i] a[first + r, i] over the split's columns; copy x if there is a copy.

    Grid (tiles x PIECES, splits).
    """
    tile = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES * BR
    r = piece + tl.arange(0, BR)
    split = tl.program_id(1)
    row = tile // tiles_of_a_row
    position = tile % tiles_of_a_row * BM + tl.arange(0, BM)
    valid = position < tokens
    m = row.to(tl.int64) * tokens + position
    first, count = _adapter_columns(batch_rows, spans, row, num_ranks, SPAN_ALIGNMENT)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_columns)
    if batch_rows is not None:
        # x is not read for ranks beyond the row's adapter.
        end = tl.where(count > piece, end, begin)
    x_rows = x + m[:, None] * stride_x
    a_rows = a + (first + r).to(tl.int64)[None, :] * stride_ar
    if dropped_rows is not None:
        counter = _dropout_counter(dropped_rows, dropped_tokens, first_token, row * tokens + position, valid)
        key0, key1, threshold, step = _stream_of(batch_rows, streams, steps, row, key0, key1, threshold, step)
    total = tl.zeros((BM, BR), dtype=tl.float32)
    for column in range(begin, end, BK):
        i = column + tl.arange(0, BK)
        x_tile = tl.load(x_rows + i[None, :], mask=valid[:, None] & (i < num_columns)[None, :], other=0.0)
        a_tile = tl.load(
            a_rows + i.to(tl.int64)[:, None] * stride_ai,
            mask=(i < num_columns)[:, None] & (r < count)[None, :],
            other=0.0,
        )
        if dropped_rows is not None:
            drop = dropped_tile(key0, key1, threshold, step, counter[0], counter[1], column, BK)
            x_tile = tl.where(drop, 0.0, x_tile)
        if copy is not None:
            to = copy + m[:, None] * stride_copy + i[None, :]
            tl.store(to, x_tile, mask=valid[:, None] & (i < tl.where(piece == 0, num_columns, 0))[None, :])
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
    to = out + split.to(tl.int64) * stride_split + m[:, None] * stride_out + r[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=valid[:, None] & (r < num_ranks)[None, :])


@triton.jit(do_not_specialize=_WORDS, do_not_specialize_on_alignment=_SLICES)
def up_kernel(
    xa, b, bias, out, batch_rows, spans, dropped_rows, streams, steps,
    tokens, num_columns, num_ranks, stride_xa, stride_bo, stride_br,
    tiles_of_a_row, column_tiles, dropped_tokens, first_token, key0, key1, threshold, step,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PIECES: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute out[m, o] = sum of xa[m, r] b[o, first + r], with bias[o] or a dropout.

    Grid (tiles x column_tiles), the column tiles of a tile in order, so that whole rows are written at a time.
    """
    tile = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * BN
    o = column + tl.arange(0, BN)
    row = tile // tiles_of_a_row
    position = tile % tiles_of_a_row * BM + tl.arange(0, BM)
    valid = position < tokens
    m = row.to(tl.int64) * tokens + position
    first, count = _adapter_columns(batch_rows, spans, row, num_ranks, SPAN_ALIGNMENT)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for piece in range(PIECES):
        r = piece * BR + tl.arange(0, BR)
        xa_tile = tl.load(
            xa + m[:, None] * stride_xa + r[None, :], mask=valid[:, None] & (r < count)[None, :], other=0.0
        )
        at = b + (first + r).to(tl.int64)[:, None] * stride_br + o.to(tl.int64)[None, :] * stride_bo
        b_tile = tl.load(at, mask=(r < count)[:, None] & (o < num_columns)[None, :], other=0.0)
        total = tl.dot(xa_tile, b_tile, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + o, mask=o < num_columns, other=0.0).to(tl.float32)[None, :]
    y = total.to(out.dtype.element_ty)
    if dropped_rows is not None:
        # After rounding, in the layout of the store: the mask then needs no exchange between threads.
        number, at = _dropout_counter(dropped_rows, dropped_tokens, first_token, row * tokens + position, valid)
        key0, key1, threshold, step = _stream_of(batch_rows, streams, steps, row, key0, key1, threshold, step)
        y = tl.where(dropped_tile(key0, key1, threshold, step, number, at, column, BN), 0.0, y)
    to = out + m[:, None] * num_columns + o[None, :]
    tl.store(to, y, mask=valid[:, None] & (o < num_columns)[None, :])


@triton.jit(do_not_specialize_on_alignment=_SLICES[:1])
def dy_kernel(
    dy, b, xa, dxa, db, copy, y, products, batch_rows, spans,
    tokens, num_columns, num_ranks, stride_dy, stride_b, stride_xa, stride_out, stride_copy, stride_y, stride_split,
    split_columns, stripes_of_a_row,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute dxa and the parts of db in one reading of dy. Grid (stripes, splits).

    dxa[split, m, r] = sum of dy[m, o] b[o, first + r] over the split's columns o, and db[stripe, o, r] = sum of
    dy[m, o] xa[m, r] over the stripe's BM rows m. With y also products[stripe, o] = sum of dy[m, o] y[m, o] over the
    stripe, for DoRA's magnitudes. With a copy it copies dy.
    """
    stripe = tl.program_id(0)
    r = tl.arange(0, BR)
    split = tl.program_id(1)
    row = stripe // stripes_of_a_row
    position = stripe % stripes_of_a_row * BM + tl.arange(0, BM)
    valid = position < tokens
    m = row.to(tl.int64) * tokens + position
    first, count = _adapter_columns(batch_rows, spans, row, num_ranks, SPAN_ALIGNMENT)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, num_columns)
    if batch_rows is not None:
        # A row without adapter is not read; its part of db is neither written nor added.
        end = tl.where(count > 0, end, begin)
    in_rank = (r < count)[None, :]
    xa_tile = tl.load(xa + m[:, None] * stride_xa + r[None, :], mask=valid[:, None] & in_rank, other=0.0)
    dy_rows = dy + m[:, None] * stride_dy
    db_stripe = db + stripe.to(tl.int64) * num_columns * num_ranks
    total = tl.zeros((BM, BR), dtype=tl.float32)
    for column in range(begin, end, BK):
        o = column + tl.arange(0, BK)
        inside = o < num_columns
        dy_tile = tl.load(dy_rows + o[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        if copy is not None:
            tl.store(copy + m[:, None] * stride_copy + o[None, :], dy_tile, mask=valid[:, None] & inside[None, :])
        if y is not None:
            at = y + m[:, None] * stride_y + o[None, :]
            y_tile = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0)
            product = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), axis=0)
            tl.store(products + stripe.to(tl.int64) * num_columns + o, product, mask=inside)
        at = b + o.to(tl.int64)[:, None] * stride_b + (first + r)[None, :]
        b_tile = tl.load(at, mask=inside[:, None] & in_rank, other=0.0)
        total = tl.dot(dy_tile, b_tile, total, input_precision="ieee")
        db_tile = tl.dot(tl.trans(dy_tile), xa_tile, input_precision="ieee")
        to = db_stripe + o.to(tl.int64)[:, None] * num_ranks + r[None, :]
        tl.store(to, db_tile, mask=inside[:, None] & (r < num_ranks)[None, :])
    to = dxa + split.to(tl.int64) * stride_split + m[:, None] * stride_out + r[None, :]
    tl.store(to, total.to(dxa.dtype.element_ty), mask=valid[:, None] & (r < num_ranks)[None, :])


@triton.jit(do_not_specialize=_WORDS, do_not_specialize_on_alignment=_SLICES)
def grad_kernel(
    dxa, x, out, batch_rows, spans, dropped_rows, streams, steps,
    tokens, num_columns, num_ranks, stride_dxa, stride_x, stride_or, stride_oi,
    stripe_tokens, stripes_of_a_row, dropped_tokens, first_token, key0, key1, threshold, step,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PIECES: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute out[stripe, r, i] = sum of dxa[m, r] d(x)[m, i] over the stripe's rows.

    Grid (column tiles x PIECES, stripes).
    """
    column = tl.program_id(0) // PIECES * BN
    piece = tl.program_id(0) % PIECES * BR
    r = piece + tl.arange(0, BR)
    i = column + tl.arange(0, BN)
    stripe = tl.program_id(1)
    row = stripe // stripes_of_a_row
    _, count = _adapter_columns(batch_rows, spans, row, num_ranks, SPAN_ALIGNMENT)
    begin = stripe % stripes_of_a_row * stripe_tokens
    end = tl.minimum(begin + stripe_tokens, tokens)
    if batch_rows is not None:
        end = tl.where(count > piece, end, begin)
    if dropped_rows is not None:
        key0, key1, threshold, step = _stream_of(batch_rows, streams, steps, row, key0, key1, threshold, step)
    total = tl.zeros((BR, BN), dtype=tl.float32)
    for start in range(begin, end, BM):
        position = start + tl.arange(0, BM)
        valid = position < tokens
        m = row.to(tl.int64) * tokens + position
        at = dxa + m[:, None] * stride_dxa + r[None, :]
        dxa_tile = tl.load(at, mask=valid[:, None] & (r < count)[None, :], other=0.0)
        at = x + m[:, None] * stride_x + i[None, :]
        x_tile = tl.load(at, mask=valid[:, None] & (i < num_columns)[None, :], other=0.0)
        if dropped_rows is not None:
            number, at = _dropout_counter(dropped_rows, dropped_tokens, first_token, row * tokens + position, valid)
            drop = dropped_tile(key0, key1, threshold, step, number, at, column, BN)
            x_tile = tl.where(drop, 0.0, x_tile)
        total = tl.dot(tl.trans(dxa_tile), x_tile, total, input_precision="ieee")
    to = out + stripe.to(tl.int64) * num_ranks * num_columns + r[:, None] * stride_or + i[None, :] * stride_oi
    tl.store(to, total, mask=(r < num_ranks)[:, None] & (i < num_columns)[None, :])


@triton.jit(do_not_specialize_on_alignment=["batch_rows", "scales"])
def add_partials(
    partials, out, batch_rows, owners, scales,
    size, num_partials, partial_size, partials_of_a_row, scale,
    width, all_ranks, max_rank, stride_out,
    RANK_IS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute out[e] = scale * (partials[0, e] + partials[1, e] + ...), in this order, e < size.

    If rows choose, out is (width, all_ranks) or (all_ranks, width), a partial (width, max_rank) or (max_rank, width),
    and an adapter's column sums the partials of the rows that use it, times the adapter's scale if there are scales.
    With a stride_out, out has rows of `width` elements, `stride_out` apart.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    source = e
    if batch_rows is not None:
        column = e % all_ranks if RANK_IS_LAST else e // width
        other = e // all_ranks if RANK_IS_LAST else e % width
        owner = tl.load(owners + 2 * column, mask=inside, other=0)
        place = tl.load(owners + 2 * column + 1, mask=inside, other=0)
        source = other * max_rank + place if RANK_IS_LAST else place.to(tl.int64) * width + other
    # Advanced as a pointer, since all partials may exceed 2^31 elements.
    at = partials + source
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_partials, 8):
        # Eight loads in flight at a time; the sum stays sequential.
        for step in tl.static_range(8):
            index = first + step
            wanted = e < tl.where(index < num_partials, size, 0)
            if batch_rows is not None:
                user = tl.load(batch_rows + index // partials_of_a_row, mask=index < num_partials, other=-1)
                wanted = wanted & (user == owner)
            total += tl.load(at, mask=wanted, other=0.0)
            at += partial_size
    if scales is not None:
        total *= scale * tl.load(scales + owner, mask=inside, other=0.0)
    else:
        total *= scale
    if stride_out is not None:
        e = e // width * stride_out + e % width
    tl.store(out + e, total.to(out.dtype.element_ty), mask=inside)
