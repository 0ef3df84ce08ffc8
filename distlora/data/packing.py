"""Encoded documents to packed sequences: the corpus on disk, held-out documents, mixtures, the files of a split.

A *piece* is what is packed: a document, a stretch of a plain text that is longer than a row, or the two documents of a
pair. What a flag and a label mean is in README.md. Letters: P pieces, D documents, S sources, N rows, L tokens per row.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from distlora.config import DataConfig
from distlora.data.encoding import Encoded, TooLong
from distlora.data.rows import (
    BAD,
    DOCUMENTS,
    HELD_OUT,
    IMAGE,
    IMAGES,
    JUDGED,
    MARGINS,
    MIXTURE,
    RECORDS,
    REJECTED,
    RIGHT,
    STARTS,
    TRAINED,
    below,
    digest_number,
    hash64,
    image_digest,
    split_file,
)
from distlora.data.sources import DataSource

TRUNCATED, DROPPED, DUPLICATE = 1, 2, 3
"""Fates of a document: it lost its end; it was left out for its length, or because an equal one came before."""
_PIECE = np.dtype([(name, "i8") for name in ("document", "length", "targets", "record", "images")] + [("margin", "f4")])
_DOCUMENT = np.dtype([("source", "i8"), ("fate", "i1")])
_FILES = ("tokens", "marks", "records", "images")
_THREADS, _AHEAD = 2, 16
"""Threads that read images, and documents whose images they read ahead."""


@dataclass
class Corpus:
    """Documents cut into pieces of at most `sequence_length` tokens, in the order in which they were appended."""

    stem: Path
    """Files `<stem>.tokens` (int32), `<stem>.marks` (uint8), `<stem>.records` (JSON lines of prompts) and
    `<stem>.images` (each distinct encoded image once) hold the pieces, one after the other."""
    sequence_length: int
    seen: set[bytes] | None = None
    """Digests of the documents so far, and of those of corpora that share the set; None: none are kept."""
    drops_seen: bool = True
    """Leave out documents that are in `seen`."""
    num_documents: int = 0
    _pieces: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, _PIECE)])
    _documents: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, _DOCUMENT)])
    _images: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(first byte, bytes, tokens, digest) of each image of each piece."""
    _stored: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)
    """(first byte, bytes, digest) of each distinct image, by its digest."""

    @property
    def pieces(self) -> np.ndarray:
        """(P,) records: document, ascending; length; targets, above 0; bytes of its record; images; margin."""
        self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0]

    @property
    def documents(self) -> np.ndarray:
        """(D,) records of the documents, those that left no piece included: source (its number) and fate."""
        self._documents = [np.concatenate(self._documents)]
        return self._documents[0]

    @property
    def pieces_of(self) -> np.ndarray:
        """Pieces of each document, (D,) int64; 0: left out for its length, or since no token of it is trained."""
        return np.bincount(self.pieces["document"], minlength=len(self.documents))

    def append(self, encoded: Iterable[Encoded], source: int, too_long: TooLong) -> np.ndarray:
        """Add documents of a source, and return their pieces, as `pieces` has them.

        Pieces without a trained target are left out; a document may have none left. A document longer than a row is cut
        to it (`truncate`), left out (`drop`) or becomes several pieces (`split`, not for answers that are compared or
        judged). A pair whose answers are judged becomes two pieces.
        """
        new_pieces, new_documents = [], []
        files = (self._file(name).open("ab") for name in _FILES)
        tokens_file, marks_file, records_file, images_file = files
        with tokens_file, marks_file, records_file, images_file:
            for number, (document, images) in enumerate(_read_ahead(encoded), start=self.num_documents):
                pieces, fate = self._cut(document, too_long, [digest for _, digest in images.values()])
                for piece in pieces:
                    if num_targets := piece.num_targets:
                        tokens_file.write(piece.tokens.data)
                        marks = piece.trained * np.uint8(TRAINED)
                        if piece.rejected is not None:
                            marks[piece.rejected] |= REJECTED
                        if piece.is_good is not None:
                            marks[0] |= JUDGED if piece.is_good else JUDGED | BAD
                        marks_file.write(marks.data)
                        size = records_file.write(piece.record)
                        for span in piece.images:
                            first, length, digest = self._store(*images[span.image], images_file)
                            self._images.append((first, length, span.end - span.start, digest))
                        counts = (number, len(piece.tokens), num_targets, size, len(piece.images))
                        new_pieces.append((*counts, piece.margin))
                new_documents.append((source, fate))
        self._pieces.append(np.array(new_pieces, _PIECE))
        self._documents.append(np.array(new_documents, _DOCUMENT))
        self.num_documents += len(new_documents)
        return self._pieces[-1]

    def _cut(self, document: Encoded, too_long: TooLong, images: list[bytes]) -> tuple[list[Encoded], int]:
        """Return the pieces of a document, and its fate; 0: it is whole. `images`: digests of its images."""
        pieces, length = document.apart(), self.sequence_length
        if self.seen is not None and self._is_seen(document, images) and self.drops_seen:
            return [], DUPLICATE
        if all(len(piece.tokens) <= length for piece in pieces):
            return pieces, 0
        if too_long == "truncate":
            cut = [piece.cut(length) for piece in pieces]
            if any(len(piece.images) < len(whole.images) for piece, whole in zip(cut, pieces, strict=True)):
                cut = [piece for piece in cut if piece.num_targets]  # An image that does not fit left no answer.
            return cut, TRUNCATED if cut else DROPPED
        if too_long == "drop":
            return [], DROPPED
        assert document.rejected is None is document.is_good, "refused by the settings"
        parts = [slice(start, start + length) for start in range(0, len(document.tokens), length)]
        return [Encoded(document.tokens[span], document.trained[span]) for span in parts], 0

    def _is_seen(self, document: Encoded, images: list[bytes]) -> bool:
        """Return whether an equal document came before; remember this one."""
        assert self.seen is not None
        parts = [document.tokens.tobytes(), document.trained.tobytes(), str(document.rejected).encode()]
        if document.margin:
            parts.append(str(document.margin).encode())
        if document.is_good is not None:
            parts.append(str(document.is_good).encode())
        parts += images
        if document.record:  # Rewards read its columns: another answer to the same prompt is another document.
            parts.append(document.record)
        digest = hashlib.blake2b(b"".join(parts), digest_size=16).digest()
        known = digest in self.seen
        self.seen.add(digest)
        return known

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all tokens (int32) and marks (uint8), flat and memory-mapped. Needs at least one piece.

        A mark has the bits TRAINED: predicting this token is trained; REJECTED: a pair's rejected document begins here;
        JUDGED, BAD: a judged document does; IMAGE: an embedding of an image replaces this token.
        """
        return (
            np.memmap(self._file("tokens"), np.int32, mode="r"),
            np.memmap(self._file("marks"), np.uint8, mode="r"),
        )

    def write_records(self, folder: Path, split: str, pieces: np.ndarray) -> None:
        """Write the JSON lines of these pieces, (n,) int64, and where each ends, if the pieces have any."""
        sizes = self.pieces["record"]
        if not sizes.any():
            return
        starts = np.cumsum(sizes) - sizes
        with (
            self._file("records").open("rb") as stored,
            split_file(folder, split, RECORDS, ".jsonl").open("wb") as file,
        ):
            for piece in pieces.tolist():
                stored.seek(starts[piece])
                file.write(stored.read(sizes[piece]))
        np.save(split_file(folder, split, RECORDS), np.cumsum(sizes[pieces]), allow_pickle=False)

    def _store(self, content: bytes, digest: bytes, file: BinaryIO) -> tuple[int, int, int]:
        """Append an encoded image unless it is there."""
        if digest not in self._stored:
            self._stored[digest] = (file.tell(), file.write(content), digest_number(digest))
        return self._stored[digest]

    def write_images(self, folder: Path, split: str, pieces: np.ndarray, rows: np.ndarray) -> dict[str, int]:
        """Write the images of these pieces, in these rows (both (n,) int64), each once; return counts of them.

        The split's table has one for each place, in the order of the rows: (I, 5) int64, its row, its first byte, its
        bytes, its tokens and the digest of its bytes.
        """
        counts = self.pieces["images"]
        number = counts[pieces].sum()
        if not number:
            return {}
        before, places = np.cumsum(counts[pieces]) - counts[pieces], np.array(self._images, np.int64)
        first = (np.cumsum(counts) - counts)[pieces] - before
        chosen = places[np.repeat(first, counts[pieces]) + np.arange(number)]
        starts, of_start, numbers = np.unique(chosen[:, 0], return_index=True, return_inverse=True)
        sizes = chosen[of_start, 1]
        with (
            self._file("images").open("rb") as stored,
            split_file(folder, split, IMAGES, ".bin").open("wb") as file,
        ):
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                stored.seek(start)
                file.write(stored.read(size))
        columns = np.repeat(rows, counts[pieces]), (np.cumsum(sizes) - sizes)[numbers], chosen[:, 1:]
        np.save(split_file(folder, split, IMAGES), np.column_stack(columns), allow_pickle=False)
        return {"images": int(number), "image_bytes": int(sizes.sum())}

    def delete(self) -> None:
        """Remove the files."""
        for name in _FILES:
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.stem.with_suffix("." + name)


def read_image(image: str | bytes) -> bytes:
    """Return the encoded bytes of an image, of a file if it is a path."""
    return Path(image).read_bytes() if isinstance(image, str) else image


def _read_ahead(
    encoded: Iterable[Encoded],
) -> Iterator[tuple[Encoded, dict[str | bytes, tuple[bytes, bytes]]]]:
    """Yield documents with the bytes and the digest of each of their images, read by threads ahead."""

    def read(image: str | bytes) -> tuple[bytes, bytes]:
        content = read_image(image)
        return content, image_digest(content)

    waiting: deque[tuple[Encoded, dict[str | bytes, Future[tuple[bytes, bytes]]]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for document in itertools.chain(encoded, [None] * _AHEAD):
            if document is not None:
                waiting.append((document, {span.image: pool.submit(read, span.image) for span in document.images}))
            if waiting and (document is None or len(waiting) > _AHEAD):
                first, images = waiting.popleft()
                yield first, {image: reading.result() for image, reading in images.items()}


class Mixture(NamedTuple):
    """The part of each source that is used, and the part of its documents that is held out."""

    wanted: np.ndarray | None
    """(S,) float64: shares of the trained targets, summing to 1; None: every source is taken whole."""
    until_all: bool
    """Sources that end are repeated until the last one is used up; else all end with the first."""
    eval_fraction: float
    """Fraction of the documents of each source that is held out."""
    seed: int

    @classmethod
    def of(cls, data: DataConfig, sources: Sequence[DataSource], seed: int) -> Mixture:
        """Return the mixture of the training sources."""
        weights = np.array([source.config.weight for source in sources if source.config.weight is not None])
        fraction = 0.0 if data.held_out_source is not None else data.eval_fraction
        wanted = weights / weights.sum() if len(weights) else None
        return cls(wanted, data.stopping_strategy == "all_exhausted", fraction, seed)

    def volume(self, sizes: np.ndarray, ended: np.ndarray) -> float:
        """Targets of a mixture that ends when the first source is used up or, `until_all`, when the last one is.

        `sizes` is (S,) float64, `ended` (S,) bool: whether a source was read to its end. Sources that have not ended
        bound the volume, since they are not to be repeated. Those that ended without a target do not count: the others
        share what is theirs.
        """
        assert self.wanted is not None
        ratios = sizes / self.wanted
        if self.until_all and not ended.all():
            return float(ratios[~ended].min())
        counting = ratios[(sizes > 0) | ~ended]
        return float(counting.max() if self.until_all else counting.min())

    def held_out(self, corpus: Corpus) -> np.ndarray:
        """Return a mask of the held-out documents, (D,) bool: the fraction applies to each source."""
        chosen = np.zeros(len(corpus.documents), bool)
        usable, sources = corpus.pieces_of > 0, corpus.documents["source"]
        for source in np.unique(sources).tolist():
            own = sources == source
            chosen[own] = held_out(usable[own], self.eval_fraction, self.seed, source)
        return chosen

    def use_pieces(self, corpus: Corpus, in_split: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Return how often each piece is used in a split, (P,) int64. `in_split` is (D,) bool."""
        ours = in_split[corpus.pieces["document"]]
        used = ours.astype(np.int64)
        if self.wanted is not None and ours.any():
            targets, sources = (
                corpus.pieces["targets"][ours],
                corpus.documents["source"][corpus.pieces["document"]][ours],
            )
            sizes = np.bincount(sources, weights=targets, minlength=len(self.wanted))
            used[ours] = copies(targets, sources, self.wanted, self.volume(sizes, ended), self.seed)
        return used


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


def write_split(
    folder: Path, split: str, corpus: Corpus, in_split: np.ndarray, used: np.ndarray, pad: int, *, single: bool
) -> dict[str, Any]:
    """Pack the pieces of a split, each as often as `used` ((P,) int64) says, into its files; its counts.

    `single`: each in a sequence of its own.
    """
    pieces, documents = corpus.pieces, corpus.documents
    lengths = pieces["length"]
    chosen = np.repeat(np.arange(len(pieces)), used)
    packing = pack((np.cumsum(lengths) - lengths)[chosen], lengths[chosen], corpus.sequence_length, single=single)
    packed, shape = chosen[packing.pieces], (packing.num_rows, corpus.sequence_length)

    def new_file(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        return np.lib.format.open_memmap(split_file(folder, split, name), mode="w+", dtype=dtype, shape=shape)

    tokens = new_file("tokens", np.int32, shape)
    flags = new_file("flags", np.uint8, shape)
    targets, pairs = (new_file(name, np.int32, shape[:1]) for name in ("targets", "pairs"))
    new_file(DOCUMENTS, np.int64, packed.shape)[:] = pieces["document"][packed]
    corpus.write_records(folder, split, packed)
    counts: dict[str, Any] = corpus.write_images(
        folder, split, packed, np.repeat(np.arange(packing.num_rows), np.diff(packing.row_bounds))
    )
    largest = 0
    for rows, row_tokens, row_flags in build_rows(packing, *corpus.read(), pad):
        tokens[rows], flags[rows] = row_tokens, row_flags
        targets[rows] = np.count_nonzero(row_flags & TRAINED, axis=1)
        pairs[rows] = np.count_nonzero(row_flags & (REJECTED | JUDGED), axis=1)
        largest = max(largest, int(row_tokens.max()))
        if counts.get("images"):
            counts["image_tokens"] = counts.get("image_tokens", 0) + int(np.count_nonzero(row_flags & IMAGE))
    if (margins := pieces["margin"][packed]).any():
        in_row = np.diff(packing.row_bounds)
        number = np.arange(len(margins)) - np.repeat(packing.row_bounds[:-1], in_row)
        table = new_file(MARGINS, np.float32, (packing.num_rows, int(pairs.max())))
        table[np.repeat(np.arange(packing.num_rows), in_row), number] = margins
        counts["margins"] = table.shape[1]
    if corpus.seen is not None:
        counts["duplicates"] = int(np.count_nonzero((documents["fate"] == DUPLICATE) & in_split))
    pieces_of, fate = corpus.pieces_of, documents["fate"]
    is_used = np.bincount(pieces["document"][used > 0], minlength=len(documents)) > 0
    num_tokens = int(packing.lengths.sum())
    masks = {
        "documents": is_used,
        "truncated": (fate == TRUNCATED) & is_used,
        "split": (pieces_of > 1) & is_used & (not pairs.any()),
        "dropped": (pieces_of == 0) & (fate != DROPPED) & (fate != DUPLICATE),
        "dropped_long": fate == DROPPED,
        "unused": (pieces_of > 0) & ~is_used,
    }
    return counts | {
        **{name: int(np.count_nonzero(mask & in_split)) for name, mask in masks.items()},
        "rows": packing.num_rows,
        "pairs": int(pairs.sum(dtype=np.int64)),
        "tokens": num_tokens,
        "targets": int(targets.sum(dtype=np.int64)),
        "padding": packing.num_rows * corpus.sequence_length - num_tokens,
        "pieces": int(used.sum()),
        "largest_token": largest,
    }


def count_sources(
    counts: dict[str, Any], corpus: Corpus, sources: list[DataSource], used: np.ndarray, wanted: np.ndarray | None
) -> None:
    """Add `sources`, one entry for each: where it is, what of it is used, and its share of the trained targets."""
    piece_sources = corpus.documents["source"][corpus.pieces["document"]]
    targets, lengths = corpus.pieces["targets"], corpus.pieces["length"]
    counts["sources"] = []
    for number, source in enumerate(sources):
        own = piece_sources == number
        ours = int((targets * used)[own].sum())
        counts["sources"].append(
            {
                **source.describe(),
                "documents": len(np.unique(corpus.pieces["document"][own & (used > 0)])),
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
        out_flags[target] |= marks[source] & IMAGE
        out_flags[begin] |= STARTS | (marks[packing.offsets[pieces]] & (JUDGED | BAD))
        out_flags[rejected] |= STARTS | REJECTED
        out_flags[end] |= STARTS  # Where the next piece starts too, or the next row, or the padding.
        yield (
            slice(first, last),
            out_tokens.reshape(-1, length),
            out_flags[:-1].reshape(-1, length),
        )


def mismatched_rows(
    tokens: np.ndarray, flags: np.ndarray, pad_token_id: int, *, single: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, flags) of rows with the judged prompts of other rows (n, L), each with the answer before it.

    The first has the last one's. What is then longer than a row is cut. An only answer has no labels. `single`: each in
    a row of its own.
    """
    length = tokens.shape[1]
    tokens, flags = tokens.reshape(-1), flags.reshape(-1)
    starts, targets = np.flatnonzero(flags & JUDGED), np.flatnonzero(flags & TRAINED)
    bounds = np.append(np.flatnonzero(flags & STARTS), len(flags))
    ends = bounds[np.searchsorted(bounds, starts, side="right")]
    answers = targets[np.searchsorted(targets, starts)] + 1  # A label stands one position before its token.
    prompts = map(np.arange, starts, answers)
    others = map(np.arange, np.roll(answers, 1), np.roll(ends, 1))  # The answer before.
    places = [np.concatenate(pair)[:length] for pair in zip(prompts, others, strict=True)]
    lengths, source = np.array([len(place) for place in places]), np.concatenate(places)
    marks = np.append(0, flags[:-1] & TRAINED).astype(np.uint8)[source]
    if len(starts) == 1:  # Its own answer says nothing of KL: without a label it adds 0.
        marks[:] = 0
    packing = pack(np.cumsum(lengths) - lengths, lengths, length, single=single)
    built = list(build_rows(packing, tokens[source], marks, pad_token_id))
    return np.concatenate([rows for _, rows, _ in built]), np.concatenate([marked for _, _, marked in built])
