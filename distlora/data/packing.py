"""The third stage: documents of any length to rows of L tokens, each document whole inside one row.

A *piece* is what is packed: a document, a stretch of a plain text that is longer than a row, or the two documents of a
pair. Rows are laid out in numpy; what a flag and a label mean is in README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distlora.data.rows import REJECTED, STARTS, TRAINED

_TOKENS_AT_ONCE = 4_000_000
"""Tokens laid out at a time: bounds the memory of building rows to about 200 MB, for any amount of data."""


def assign_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of every piece, (P,) int64: best-fit decreasing, the same for the same lengths.

    Longest first, each piece goes where it leaves the least room. Rows with equal room are kept together, and the
    rooms in use are the bits of one integer, so that finding the best one is a shift and a lowest bit: linear in the
    pieces, at about 0.4 us each. Rows are numbered by their first piece, so that they follow the order of the data.
    `lengths` are from 1 to `capacity`.
    """
    if len(lengths) == 0:
        return np.empty(0, np.int64)
    assert lengths.min() >= 1, "an empty piece"
    assert lengths.max() <= capacity, f"a piece of {lengths.max()} tokens for rows of {capacity}"
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    num_rows = 0
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        room -= length
        if room:
            rows_with_room[room].append(row)
            rooms |= 1 << room
        row_of[piece] = row
    first_piece = np.full(num_rows, len(lengths))
    np.minimum.at(first_piece, row_of, np.arange(len(lengths)))
    number = np.empty(num_rows, np.int64)
    number[np.argsort(first_piece)] = np.arange(num_rows)
    return number[row_of]


@dataclass(frozen=True, slots=True)
class Packing:
    """The place of every piece. Pieces are sorted by row, inside a row by their order in the data."""

    offsets: np.ndarray
    """(P,) int64: first token of the piece in the flat array of all tokens."""
    lengths: np.ndarray
    """(P,) int64."""
    starts: np.ndarray
    """(P,) int64: position of its first token in its row."""
    pieces: np.ndarray
    """(P,) int64: the number of the piece among those that were packed."""
    row_bounds: np.ndarray
    """(N + 1,) int64: row n holds the pieces from row_bounds[n] to row_bounds[n + 1]."""
    sequence_length: int

    @property
    def num_rows(self) -> int:
        """Return the number of packed sequences."""
        return len(self.row_bounds) - 1


def pack(offsets: np.ndarray, lengths: np.ndarray, sequence_length: int) -> Packing:
    """Pack pieces, given by their place in a flat array of tokens (both (P,) int64), into rows."""
    row_of = assign_rows(lengths, sequence_length)
    order = np.argsort(row_of, kind="stable")
    row_of, lengths = row_of[order], lengths[order]
    num_rows = int(row_of[-1]) + 1 if len(row_of) else 0
    row_bounds = np.searchsorted(row_of, np.arange(num_rows + 1))
    before = np.cumsum(lengths) - lengths  # Tokens before each piece, in all rows; minus those of earlier rows:
    starts = before - before[row_bounds[row_of]]
    return Packing(offsets[order], lengths, starts, order, row_bounds, sequence_length)


def build_rows(
    packing: Packing, tokens: np.ndarray, marks: np.ndarray, pad_token_id: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Lay out the rows, some at a time: (which rows, tokens (n, L) int32, flags (n, L) uint8).

    `tokens` (int32) and `marks` (uint8, as in `Corpus.read`) are flat over all documents. The label at a position is
    the next token where that is trained and of the same document. Padding has the pad token, no label, and starts as a
    document of its own.
    """
    length = packing.sequence_length
    step = max(1, _TOKENS_AT_ONCE // length)
    for first in range(0, packing.num_rows, step):
        last = min(first + step, packing.num_rows)
        pieces = slice(packing.row_bounds[first], packing.row_bounds[last])
        lengths, starts = packing.lengths[pieces], packing.starts[pieces]
        row = np.repeat(np.arange(last - first), np.diff(packing.row_bounds[first : last + 1]))
        begin = row * length + starts  # Flat positions of the pieces' first tokens in these rows.
        end = begin + lengths
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # Position in its piece.
        source = np.repeat(packing.offsets[pieces], lengths) + inside
        target = np.repeat(begin, lengths) + inside

        out_tokens = np.full((last - first) * length, pad_token_id, np.int32)
        out_tokens[target] = tokens[source]
        out_flags = np.zeros((last - first) * length + 1, np.uint8)  # One more: where the padding of a full row starts.
        is_trained = np.zeros(len(out_flags), bool)
        is_trained[target] = marks[source] & TRAINED != 0
        rejected = target[marks[source] & REJECTED != 0]
        # The first token of a document has nothing before it that could predict it.
        is_trained[begin] = is_trained[rejected] = False
        out_flags[:-1][is_trained[1:]] = TRAINED
        out_flags[begin] |= STARTS
        out_flags[rejected] |= STARTS | REJECTED
        out_flags[end] |= STARTS  # Where the next piece starts too, or the next row, or the padding.
        yield (
            slice(first, last),
            out_tokens.reshape(-1, length),
            out_flags[:-1].reshape(-1, length),
        )
