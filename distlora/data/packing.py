"""Encoded documents to packed sequences: the corpus on disk, held-out documents, mixtures, the files of a split.

A *piece* is what is packed: a document, a stretch of a plain text that is longer than a row, or the two documents of a
pair. What a flag and a label mean is in README.md. Letters: P pieces, D documents, S sources, N rows, L tokens per row.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distlora.data.rows import BAD, DOCUMENTS, JUDGED, MARGINS, RECORDS, REJECTED, RIGHT, STARTS, TRAINED, split_file
from distlora.data.sources import Source
from distlora.data.turns import Encoded

HELD_OUT, ROW_ORDER, MIXTURE, SAMPLES, PARTS = 1, 2, 3, 4, 5
"""Uses of hashes: the first word, so that no two uses share a stream."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _scramble(state: np.ndarray) -> np.ndarray:
    """Return the output function of splitmix64: a bijection of uint64 that mixes every bit into every other."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash64(words: tuple[int, ...], count: int, start: int = 0) -> np.ndarray:
    """Return uint64 numbers `start` to `start + count`; the i-th depends on `words` (each below 2**64) and i alone."""
    state = np.zeros(1, np.uint64)  # An array, since numpy warns when a uint64 scalar wraps around.
    for word in words:
        state = _scramble((state ^ np.uint64(word)) + _GOLDEN)
    return _scramble(state + np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN)


def below(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Return a mask of the uint64 hashes among the lowest `fraction` of all values."""
    return hashes < np.uint64(int(fraction * 2**53) << 11)


TooLong = Literal["truncate", "drop", "split"]

_TRUNCATED, _DROPPED, _DUPLICATE = 1, 2, 3
_FILES = ("tokens", "marks", "records")


@dataclass
class Corpus:
    """Documents cut into pieces of at most `sequence_length` tokens, in the order in which they were appended."""

    stem: Path
    """Files `<stem>.tokens` (int32), `<stem>.marks` (uint8) and `<stem>.records` (JSON lines of prompts) hold the
    pieces, one after the other."""
    sequence_length: int
    seen: set[bytes] | None = None
    """Digests of the documents so far, and of those of corpora that share the set; None: none are kept."""
    drops_seen: bool = True
    """Leave out documents that are in `seen`."""
    _lengths: array.array[int] = field(default_factory=lambda: array.array("q"))
    _targets: array.array[int] = field(default_factory=lambda: array.array("q"))
    _documents: array.array[int] = field(default_factory=lambda: array.array("q"))
    _sources: array.array[int] = field(default_factory=lambda: array.array("q"))
    _fates: array.array[int] = field(default_factory=lambda: array.array("b"))
    _records: array.array[int] = field(default_factory=lambda: array.array("q"))
    _margins: array.array[float] = field(default_factory=lambda: array.array("f"))

    def append(self, encoded: Iterable[Encoded], source: int, too_long: TooLong) -> None:
        """Add documents of a source. Pieces without a trained target are left out; a document may have none left.

        A document longer than a row is cut to it (`truncate`), left out (`drop`) or becomes several pieces (`split`,
        not for answers that are compared or judged). A pair whose answers are judged becomes two pieces.
        """
        length = self.sequence_length
        files = (self._file(name).open("ab") for name in _FILES)
        with next(files) as tokens_file, next(files) as marks_file, next(files) as records_file:
            for document in encoded:
                pieces, fate = document.apart(), 0
                if self.seen is not None and self._is_seen(document) and self.drops_seen:
                    pieces, fate = [], _DUPLICATE
                elif any(len(piece.tokens) > length for piece in pieces):
                    if too_long == "truncate":
                        pieces, fate = [piece.cut(length) for piece in pieces], _TRUNCATED
                    elif too_long == "drop":
                        pieces, fate = [], _DROPPED
                    else:
                        assert document.rejected is None is document.is_good, "refused by the settings"
                        starts = range(0, len(document.tokens), length)
                        parts = [slice(start, start + length) for start in starts]
                        pieces = [Encoded(document.tokens[part], document.trained[part]) for part in parts]
                for piece in pieces:
                    if num_targets := piece.num_targets:
                        tokens_file.write(piece.tokens.data)
                        marks = piece.trained * np.uint8(TRAINED)
                        if piece.rejected is not None:
                            marks[piece.rejected] |= REJECTED
                        if piece.is_good is not None:
                            marks[0] |= JUDGED if piece.is_good else JUDGED | BAD
                        marks_file.write(marks.data)
                        self._records.append(records_file.write(piece.record))
                        self._lengths.append(len(piece.tokens))
                        self._targets.append(num_targets)
                        self._documents.append(len(self._fates))
                        self._margins.append(piece.margin)
                self._sources.append(source)
                self._fates.append(fate)

    def _is_seen(self, document: Encoded) -> bool:
        """Return whether an equal document came before; remember this one."""
        assert self.seen is not None
        parts = [document.tokens.tobytes(), document.trained.tobytes(), str(document.rejected).encode()]
        if document.margin:
            parts.append(str(document.margin).encode())
        if document.is_good is not None:
            parts.append(str(document.is_good).encode())
        if document.record:  # Rewards read its columns: another answer to the same prompt is another document.
            parts.append(document.record)
        digest = hashlib.blake2b(b"".join(parts), digest_size=16).digest()
        known = digest in self.seen
        self.seen.add(digest)
        return known

    @property
    def num_documents(self) -> int:
        """Documents appended, those that left no piece included."""
        return len(self._fates)

    @property
    def num_pieces(self) -> int:
        """Return the number of pieces."""
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, (P,) int64."""
        return np.array(self._lengths, np.int64)

    @property
    def targets(self) -> np.ndarray:
        """Trained targets of each piece, (P,) int64, all above 0."""
        return np.array(self._targets, np.int64)

    @property
    def margins(self) -> np.ndarray:
        """Margin of each piece that is a pair, (P,) float32, 0 of others."""
        return np.array(self._margins, np.float32)

    @property
    def documents(self) -> np.ndarray:
        """The document that each piece is of, (P,) int64, ascending."""
        return np.array(self._documents, np.int64)

    @property
    def sources(self) -> np.ndarray:
        """The source that each document is of, (D,) int64."""
        return np.array(self._sources, np.int64)

    @property
    def pieces_of(self) -> np.ndarray:
        """Pieces of each document, (D,) int64; 0: left out for its length, or since no token of it is trained."""
        return np.bincount(self.documents, minlength=self.num_documents)

    @property
    def truncated(self) -> np.ndarray:
        """Return a mask of the documents that lost their end, (D,) bool."""
        return np.array(self._fates, np.int8) == _TRUNCATED

    @property
    def dropped_long(self) -> np.ndarray:
        """Return a mask of the documents that were left out for their length, (D,) bool."""
        return np.array(self._fates, np.int8) == _DROPPED

    @property
    def duplicates(self) -> np.ndarray:
        """Return a mask of the documents that were left out because an equal one came before, (D,) bool."""
        return np.array(self._fates, np.int8) == _DUPLICATE

    def pieces_since(self, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, targets, documents) of the pieces from number `piece` on, each int64."""
        parts = (self._lengths[piece:], self._targets[piece:], self._documents[piece:])
        return tuple(np.array(part, np.int64) for part in parts)  # type: ignore[return-value]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all tokens (int32) and marks (uint8), flat and memory-mapped. Needs at least one piece.

        A mark has the bits TRAINED: predicting this token is trained; REJECTED: a pair's rejected document begins here;
        JUDGED, BAD: a judged document does.
        """
        return (
            np.memmap(self._file("tokens"), np.int32, mode="r"),
            np.memmap(self._file("marks"), np.uint8, mode="r"),
        )

    def write_records(self, folder: Path, split: str, pieces: np.ndarray) -> None:
        """Write the JSON lines of these pieces, (n,) int64, and where each ends, if the pieces have any."""
        ends = np.cumsum(np.array(self._records, np.int64))
        if not ends.any():
            return
        written = 0
        with (
            self._file("records").open("rb") as stored,
            split_file(folder, split, RECORDS, ".jsonl").open("wb") as file,
        ):
            places = np.zeros(len(pieces), np.int64)
            for number, piece in enumerate(pieces.tolist()):
                stored.seek(ends[piece] - self._records[piece])
                written += file.write(stored.read(self._records[piece]))
                places[number] = written
        np.save(split_file(folder, split, RECORDS), places, allow_pickle=False)

    def delete(self) -> None:
        """Remove the files."""
        for name in _FILES:
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.stem.with_suffix("." + name)


def shares(weights: Sequence[float]) -> np.ndarray:
    """Return the weights scaled to sum to 1, (S,) float64."""
    values = np.array(weights, np.float64)
    return values / values.sum()


def volume(sizes: np.ndarray, wanted: np.ndarray, ended: np.ndarray, *, until_all: bool) -> float:
    """Targets of a mixture that ends when the first source is used up or, `until_all`, when the last one is.

    `sizes` and `wanted` are (S,) float64, `ended` (S,) bool: whether a source was read to its end. Sources that have
    not ended bound the volume, since they are not to be repeated. Those that ended without a target do not count: the
    others share what is theirs.
    """
    ratios = sizes / wanted
    if until_all and not ended.all():
        return float(ratios[~ended].min())
    counting = ratios[(sizes > 0) | ~ended]
    return float(counting.max() if until_all else counting.min())


def copies(targets: np.ndarray, sources: np.ndarray, wanted: np.ndarray, volume: float, seed: int) -> np.ndarray:
    """Return how often each piece is used, (P,) int64: more than once if its source is smaller than its part.

    `targets` and `sources` are (P,) int64. A source gives whole passes, and then the first of its pieces in the order
    of hash(seed, source, index) up to the count that comes nearest to its part; at least one piece.
    """
    result = np.zeros(len(targets), np.int64)
    for source, share in enumerate(wanted.tolist()):
        pieces = np.flatnonzero(sources == source)
        if len(pieces) == 0:
            continue
        size = int(targets[pieces].sum())
        # A quota that equals the size up to rounding is one pass.
        passes, rest = divmod(share * volume, size)
        order = pieces[np.argsort(hash64((MIXTURE, seed, source), len(pieces)), kind="stable")]
        sums = np.concatenate([[0], np.cumsum(targets[order])])
        after = min(int(np.searchsorted(sums, rest)), len(pieces))
        nearest = after - 1 if after > 0 and rest - sums[after - 1] < sums[after] - rest else after
        result[pieces] = int(passes)
        result[order[: max(nearest, 1 if passes == 0 else 0)]] += 1
    return result


def held_out(usable: np.ndarray, fraction: float, seed: int, source: int = 0) -> np.ndarray:
    """Return a mask of held-out documents: hashes of (seed, source, index) among the lowest `fraction` of all.

    `usable` and the result are (D,) bool over the documents of one source; a usable one has a trained token. With few
    documents the fraction may hit none of these: then the one with the lowest hash is held out, if another remains.
    """
    hashes = hash64((HELD_OUT, seed, source), len(usable))
    chosen = below(hashes, fraction)
    if fraction > 0 and not (chosen & usable).any() and np.count_nonzero(usable) > 1:
        candidates = np.flatnonzero(usable)
        chosen[candidates[np.argmin(hashes[candidates])]] = True
    return chosen


def held_out_documents(corpus: Corpus, fraction: float, seed: int) -> np.ndarray:
    """Return a mask of the held-out documents of a corpus, (D,) bool: the fraction applies to each source."""
    chosen = np.zeros(corpus.num_documents, bool)
    usable, sources = corpus.pieces_of > 0, corpus.sources
    for source in np.unique(sources).tolist():
        own = sources == source
        chosen[own] = held_out(usable[own], fraction, seed, source)
    return chosen


def use_pieces(
    corpus: Corpus,
    in_split: np.ndarray,
    wanted: np.ndarray | None,
    ended: np.ndarray,
    *,
    until_all: bool,
    seed: int,
) -> np.ndarray:
    """Return how often each piece is used in a split, (P,) int64. `in_split` is (D,) bool; `wanted` has the shares."""
    ours = in_split[corpus.documents]
    used = ours.astype(np.int64)
    if wanted is not None and ours.any():
        targets, sources = corpus.targets[ours], corpus.sources[corpus.documents][ours]
        sizes = np.bincount(sources, weights=targets, minlength=len(wanted))
        used[ours] = copies(targets, sources, wanted, volume(sizes, wanted, ended, until_all=until_all), seed)
    return used


def write_split(
    folder: Path, split: str, corpus: Corpus, in_split: np.ndarray, used: np.ndarray, pad: int, *, single: bool
) -> dict[str, Any]:
    """Pack the pieces of a split, each as often as `used` ((P,) int64) says, into its files; its counts.

    `single`: each in a sequence of its own.
    """
    lengths = corpus.lengths
    chosen = np.repeat(np.arange(len(lengths)), used)
    packing = pack((np.cumsum(lengths) - lengths)[chosen], lengths[chosen], corpus.sequence_length, single=single)
    shape = (packing.num_rows, corpus.sequence_length)

    def new_file(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        return np.lib.format.open_memmap(split_file(folder, split, name), mode="w+", dtype=dtype, shape=shape)

    tokens = new_file("tokens", np.int32, shape)
    flags = new_file("flags", np.uint8, shape)
    targets, pairs = (new_file(name, np.int32, shape[:1]) for name in ("targets", "pairs"))
    new_file(DOCUMENTS, np.int64, chosen.shape)[:] = corpus.documents[chosen[packing.pieces]]
    corpus.write_records(folder, split, chosen[packing.pieces])
    largest = 0
    for rows, row_tokens, row_flags in build_rows(packing, *corpus.read(), pad):
        tokens[rows], flags[rows] = row_tokens, row_flags
        targets[rows] = np.count_nonzero(row_flags & TRAINED, axis=1)
        pairs[rows] = np.count_nonzero(row_flags & (REJECTED | JUDGED), axis=1)
        largest = max(largest, int(row_tokens.max()))
    margins = corpus.margins[chosen[packing.pieces]]
    if has_margins := bool(margins.any()):
        number = np.arange(len(margins)) - np.repeat(packing.row_bounds[:-1], np.diff(packing.row_bounds))
        table = new_file(MARGINS, np.float32, (packing.num_rows, int(pairs.max())))
        table[np.repeat(np.arange(packing.num_rows), np.diff(packing.row_bounds)), number] = margins
    pieces_of = corpus.pieces_of
    used_of = np.bincount(corpus.documents[used > 0], minlength=corpus.num_documents)
    num_tokens = int(packing.lengths.sum())

    def count(documents: np.ndarray) -> int:
        return int(np.count_nonzero(documents & in_split))

    duplicates = {} if corpus.seen is None else {"duplicates": count(corpus.duplicates)}
    if has_margins:
        duplicates["margins"] = table.shape[1]
    return duplicates | {
        "documents": count(used_of > 0),
        "rows": packing.num_rows,
        "pairs": int(pairs.sum(dtype=np.int64)),
        "tokens": num_tokens,
        "targets": int(targets.sum(dtype=np.int64)),
        "padding": packing.num_rows * corpus.sequence_length - num_tokens,
        "truncated": count(corpus.truncated & (used_of > 0)),
        "split": 0 if pairs.any() else count((pieces_of > 1) & (used_of > 0)),
        "dropped": count((pieces_of == 0) & ~corpus.dropped_long & ~corpus.duplicates),
        "dropped_long": count(corpus.dropped_long),
        "unused": count((pieces_of > 0) & (used_of == 0)),
        "pieces": int(used.sum()),
        "largest_token": largest,
    }


def count_sources(
    counts: dict[str, Any], corpus: Corpus, sources: list[Source], used: np.ndarray, wanted: np.ndarray | None
) -> None:
    """Add `sources`, one entry for each: where it is, what of it is used, and its share of the trained targets."""
    piece_sources, targets, lengths = corpus.sources[corpus.documents], corpus.targets, corpus.lengths
    counts["sources"] = []
    for number, source in enumerate(sources):
        own = piece_sources == number
        ours = int((targets * used)[own].sum())
        counts["sources"].append(
            {
                **source.describe(),
                "documents": len(np.unique(corpus.documents[own & (used > 0)])),
                "tokens": int((lengths * used)[own].sum()),
                "targets": ours,
                "share": ours / counts["targets"],
                "share_wanted": None if wanted is None else float(wanted[number]),
                "most_copies": int(used[own].max(initial=0)),
            }
        )


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


def pack(offsets: np.ndarray, lengths: np.ndarray, sequence_length: int, *, single: bool = False) -> Packing:
    """Pack pieces, given by their place in a flat array of tokens (both (P,) int64), into rows; `single`: one each."""
    row_of = np.arange(len(lengths)) if single else assign_rows(lengths, sequence_length)
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
        is_right = np.zeros_like(is_trained)
        is_right[target] = marks[source] & RIGHT != 0
        out_flags[:-1][is_trained[1:] & is_right[1:]] |= RIGHT
        out_flags[begin] |= STARTS | (marks[packing.offsets[pieces]] & (JUDGED | BAD))
        out_flags[rejected] |= STARTS | REJECTED
        out_flags[end] |= STARTS  # Where the next piece starts too, or the next row, or the padding.
        yield (
            slice(first, last),
            out_tokens.reshape(-1, length),
            out_flags[:-1].reshape(-1, length),
        )
