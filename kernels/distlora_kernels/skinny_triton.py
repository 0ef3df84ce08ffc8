"""Run skinny.py's products in Triton, at the speed of reading or writing the one large operand.

If rows choose adapters, a tile never spans two rows of the batch, so a program has one adapter. Sums that several
programs share are written as fp32 parts. The last of these programs to end adds all parts, in the order of their
numbers: which program is last changes no bit. Splits depend on shapes only, never on the number of multiprocessors, and
so do the bits.

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
_SCALED = [*_SLICES, "scales"]
_WORDS = ["first_token", "key0", "key1", "threshold", "step"]
"""Arguments that may be any number; they must not create another specialization either."""
_GRAD_WORDS = [*_WORDS, "num_adapters"]
"""The same for `grad`: a loop over one adapter that the compiler knows to be one costs the main loop 14 registers."""


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
def _span_of(spans, adapter, num_ranks, SPAN_ALIGNMENT: tl.constexpr):
    """Return the first column and the rank of an adapter; (0, num_ranks) if rows do not choose, (0, 0) for -1."""
    if spans is None:
        first = 0
        count = num_ranks
    else:
        # Dividing and multiplying changes nothing, but lets the compiler load 16 bytes at a time (tl.multiple_of of a
        # loaded number does not in Triton 3.6).
        first = tl.load(spans + 2 * adapter, mask=adapter >= 0, other=0) // SPAN_ALIGNMENT * SPAN_ALIGNMENT
        count = tl.load(spans + 2 * adapter + 1, mask=adapter >= 0, other=0) // SPAN_ALIGNMENT * SPAN_ALIGNMENT
    return first, count


@triton.jit
def _scale_of(scales, adapter, scale):
    """Return the scale, times the adapter's if there are scales."""
    if scales is not None:
        scale = scale * tl.load(scales + adapter)
    return scale


@triton.jit
def _adapter_columns(batch_rows, spans, row, num_ranks, SPAN_ALIGNMENT: tl.constexpr):
    """Return the first column and the rank of the adapter of a row of the batch; (0, 0) for none."""
    adapter = 0
    if batch_rows is not None:
        adapter = tl.load(batch_rows + row)
    return _span_of(spans, adapter, num_ranks, SPAN_ALIGNMENT)


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


@triton.jit
def _is_last(counter, count):
    """Return whether this is the last of `count` programs to arrive, which then sees what the others stored.

    The last one leaves 0 in the counter, for the next launch.
    """
    # All threads have stored before one of them counts.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.store(counter, 0, mask=last)
    return last


@triton.jit
def _add_parts(parts, at, inside, count, stride, batch_rows, parts_of_a_row, adapter):
    """Return parts[at] + parts[stride + at] + ..., fp32, `count` parts in this order.

    If rows choose, only the parts of rows with this adapter.
    """
    total = tl.zeros(at.shape, dtype=tl.float32)
    # Up to eight loads in flight at a time, of 16 KB; the sum stays sequential.
    LOADS: tl.constexpr = max(1, min(8, 4096 // at.numel))
    for begin in range(0, count, LOADS):
        for step in tl.static_range(LOADS):
            index = begin + step
            end = count
            if batch_rows is not None:
                user = tl.load(batch_rows + index // parts_of_a_row, mask=index < count, other=-1)
                end = tl.where(user == adapter, count, 0)
            wanted = inside & (tl.full(at.shape, index, tl.int32) < end)
            total += tl.load(parts + at, mask=wanted, other=0.0)
            # Advanced as a pointer, since all parts may exceed 2^31 elements.
            parts += stride
    return total


@triton.jit(do_not_specialize=_WORDS, do_not_specialize_on_alignment=_SLICES)
def down_kernel(
    x, a, out, copy, beside, parts, counters, batch_rows, spans, dropped_rows, streams, steps,
    tokens, num_columns, num_ranks, stride_x, stride_ar, stride_ai, stride_out, stride_copy, stride_split,
    split_columns, tiles_of_a_row, dropped_tokens, first_token, key0, key1, threshold, step,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PIECES: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute out[m, r] = sum of d(x)[m, i] a[first + r, i]; copy x to `copy` and out to `beside`, if they are given.

    Rows of both are `stride_copy` apart.

    Grid (tiles x PIECES, splits). Several splits of the columns have parts (splits, M, PIECES x BR).
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
    inside = valid[:, None] & (r < num_ranks)[None, :]
    if parts is not None:
        parts += row.to(tl.int64) * tokens * (PIECES * BR)
        at = position[:, None] * (PIECES * BR) + r[None, :]
        tl.store(parts + split.to(tl.int64) * stride_split + at, total, mask=valid[:, None])
        last = _is_last(counters + tl.program_id(0), tl.num_programs(1))
        valid = position < tl.where(last, tokens, 0)
        inside = valid[:, None] & (r < num_ranks)[None, :]
        total = _add_parts(parts, at, valid[:, None], tl.num_programs(1), stride_split, None, 1, 0)
    xa_tile = total.to(out.dtype.element_ty)
    tl.store(out + m[:, None] * stride_out + r[None, :], xa_tile, mask=inside)
    if beside is not None:
        # Computed again: on sm_80 no register is left to keep it.
        position = tile % tiles_of_a_row * BM + tl.arange(0, BM)
        to = beside + row.to(tl.int64) * tokens * stride_copy
        tl.store(to + position.to(tl.int64)[:, None] * stride_copy + r[None, :], xa_tile, mask=inside)


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


@triton.jit
def _add_columns(
    parts, out, num_parts, stride, begin, end, num_columns, num_ranks, stride_out,
    batch_rows, spans, scales, num_adapters, parts_of_a_row, scale,
    BK: tl.constexpr, BR: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute out[o, first + r] = scale * the sum of parts[:, o, r] for o from begin to end, adapter by adapter."""
    r = tl.arange(0, BR)
    for adapter in range(num_adapters):
        first, count = _span_of(spans, adapter, num_ranks, SPAN_ALIGNMENT)
        factor = _scale_of(scales, adapter, scale)
        for column in range(begin, end, BK):
            o = column + tl.arange(0, BK)
            inside = (o < num_columns)[:, None]
            at = o[:, None] * BR + r[None, :]
            total = _add_parts(parts, at, inside, num_parts, stride, batch_rows, parts_of_a_row, adapter)
            tl.store(
                out + o[:, None] * stride_out + (first + r)[None, :], total * factor, mask=inside & (r < count)[None, :]
            )


@triton.jit
def _add_stripes(
    parts, out, counters, splits, begin, end, num_columns, num_ranks, stride_out,
    batch_rows, spans, scales, num_adapters, stripes_of_a_row, scale,
    BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Add the parts (stripes, O, BR) of db to `out`, for o from begin to end, in the last program of the split.

    With GROUP > 1 the last program of each GROUP neighbours adds theirs first, into the first one's part: as many
    programs share the work as there are groups.
    """
    stripe = tl.program_id(0)
    stripes = tl.num_programs(0)
    stride = tl.cast(num_columns, tl.int64) * BR
    ready = True
    if GROUP > 1:
        group = stripe // GROUP
        size = tl.minimum(stripes - group * GROUP, GROUP)
        neighbours = parts + group * stride * GROUP
        ready = _is_last(counters + (1 + group) * splits, size)
        if ready:
            _add_columns(
                neighbours, neighbours, size, stride, begin, end, num_columns, BR, BR,
                None, None, None, 1, 1, 1.0, BK, BR, SPAN_ALIGNMENT,
            )  # fmt: skip
    groups = tl.cdiv(stripes, GROUP)
    if ready:
        ready = _is_last(counters, groups)
    if ready:
        _add_columns(
            parts, out, groups, stride * GROUP, begin, end, num_columns, num_ranks, stride_out,
            batch_rows, spans, scales, num_adapters, stripes_of_a_row, scale, BK, BR, SPAN_ALIGNMENT,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["batch_rows", "scales"])
def dy_kernel(
    dy, b, xa, dxa, db, copy, y, products, parts, db_parts, counters, batch_rows, spans, scales,
    tokens, num_columns, num_ranks, stride_dy, stride_b, stride_xa, stride_out, stride_copy, stride_y, stride_split,
    stride_db, num_adapters, scale, split_columns, stripes_of_a_row,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute dxa[m, r] = sum of dy[m, o] b[o, first + r] and db[o, r] = scale * sum of dy[m, o] xa[m, r].

    Grid (stripes of BM rows, splits of the columns); dy is read once. Several splits have parts (splits, M, BR) of
    dxa; db_parts (stripes, O, BR) are always there. With y also products[stripe, o] = sum of dy[m, o] y[m, o]
    over the stripe, for DoRA's magnitudes. With a copy it copies dy.
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
    db_stripe = db_parts + stripe * tl.cast(num_columns, tl.int64) * BR
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
        tl.store(db_stripe + o[:, None] * BR + r[None, :], db_tile, mask=inside[:, None])
    inside = valid[:, None] & (r < num_ranks)[None, :]
    stripes = tl.num_programs(0)
    splits = tl.num_programs(1)
    if parts is not None:
        parts += row.to(tl.int64) * tokens * BR
        at = position[:, None] * BR + r[None, :]
        tl.store(parts + split.to(tl.int64) * stride_split + at, total, mask=valid[:, None])
        valid = position < tl.where(_is_last(counters + stripe, splits), tokens, 0)
        inside = valid[:, None] & (r < num_ranks)[None, :]
        total = _add_parts(parts, at, valid[:, None], splits, stride_split, None, 1, 0)
    if batch_rows is None:
        to = dxa + m[:, None] * stride_out
    else:
        # Rows of ranks alone: 32 bits suffice, and on sm_80 no register is left to keep m.
        to = dxa + row.to(tl.int64) * tokens * stride_out + position[:, None] * stride_out
    tl.store(to + r[None, :], total.to(dxa.dtype.element_ty), mask=inside)
    _add_stripes(
        db_parts, db, counters + stripes + split, splits, begin, tl.minimum(begin + split_columns, num_columns),
        num_columns, num_ranks, stride_db, batch_rows, spans, scales, num_adapters, stripes_of_a_row, scale,
        BK, BR, GROUP, SPAN_ALIGNMENT,
    )  # fmt: skip


@triton.jit(do_not_specialize=_GRAD_WORDS, do_not_specialize_on_alignment=_SCALED)
def grad_kernel(
    dxa, x, out, parts, counters, batch_rows, spans, scales, dropped_rows, streams, steps,
    tokens, num_columns, num_ranks, stride_dxa, stride_x, stride_or, stride_oi, num_adapters, scale,
    stripe_tokens, stripes_of_a_row, dropped_tokens, first_token, key0, key1, threshold, step,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PIECES: tl.constexpr, SPAN_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute out[first + r, i] = scale * sum of dxa[m, r] d(x)[m, i], times the adapter's scale if there are scales.

    Grid (column tiles x PIECES, stripes). Several stripes have parts (stripes, num_ranks, I).
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
    # Addresses moved out of the loop would fill the registers that dropout needs.
    for start in tl.range(begin, end, BM, disable_licm=True):
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
    inside = (r < num_ranks)[:, None] & (i < num_columns)[None, :]
    if parts is None:
        tl.store(out + r[:, None] * stride_or + i[None, :] * stride_oi, total * scale, mask=inside)
    else:
        stride = tl.cast(num_columns, tl.int64) * num_ranks
        at = r[:, None] * num_columns + i[None, :]
        tl.store(parts + stripe.to(tl.int64) * stride + at, total, mask=inside)
        if _is_last(counters + tl.program_id(0), tl.num_programs(1)):
            for adapter in range(num_adapters):
                first, count = _span_of(spans, adapter, num_ranks, SPAN_ALIGNMENT)
                inside = (r < count)[:, None] & (i < num_columns)[None, :]
                total = _add_parts(parts, at, inside, tl.num_programs(1), stride, batch_rows, stripes_of_a_row, adapter)
                to = out + (first + r)[:, None] * stride_or + i[None, :] * stride_oi
                tl.store(to, total * _scale_of(scales, adapter, scale), mask=inside)
