"""The encoded documents of one or several sources, on disk: what lies between the tokenizer and the packing.

A pair of preference data counts as one document, and is one piece.

Memory holds some 50 bytes a document; the tokens lie in flat files, since a large data set has billions of them.
Letters: P pieces, D documents.
"""

from __future__ import annotations

import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from distlora.data.rows import REJECTED, TRAINED
from distlora.data.turns import Encoded

TooLong = Literal["truncate", "drop", "split"]

_TRUNCATED, _DROPPED = 1, 2


def _integers() -> array.array[int]:
    return array.array("q")


@dataclass
class Corpus:
    """Documents cut into pieces of at most `sequence_length` tokens, in the order in which they were appended."""

    stem: Path
    """Two files `<stem>.tokens` (int32) and `<stem>.marks` (uint8) hold the pieces, one after the other."""
    sequence_length: int
    _lengths: array.array[int] = field(default_factory=_integers)
    _targets: array.array[int] = field(default_factory=_integers)
    _documents: array.array[int] = field(default_factory=_integers)
    _sources: array.array[int] = field(default_factory=_integers)
    _fates: array.array[int] = field(default_factory=lambda: array.array("b"))

    def append(self, encoded: Iterable[Encoded], source: int, too_long: TooLong) -> None:
        """Add documents of a source. Pieces without a trained target are left out; a document may have none left.

        A document longer than a row is cut to it (`truncate`), left out (`drop`) or becomes several pieces (`split`,
        not for pairs).
        """
        length = self.sequence_length
        with self._file("tokens").open("ab") as tokens_file, self._file("marks").open("ab") as marks_file:
            for document in encoded:
                pieces, fate = [document], 0
                if len(document.tokens) > length:
                    if too_long == "truncate":
                        pieces, fate = [document.cut(length)], _TRUNCATED
                    elif too_long == "drop":
                        pieces, fate = [], _DROPPED
                    else:
                        pieces = _split(document, length)
                for piece in pieces:
                    if num_targets := piece.num_targets:
                        tokens_file.write(piece.tokens.data)
                        marks_file.write(_marks(piece).data)
                        self._lengths.append(len(piece.tokens))
                        self._targets.append(num_targets)
                        self._documents.append(len(self._fates))
                self._sources.append(source)
                self._fates.append(fate)

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

    def pieces_since(self, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, targets, documents) of the pieces from number `piece` on, each int64."""
        parts = (self._lengths[piece:], self._targets[piece:], self._documents[piece:])
        return tuple(np.array(part, np.int64) for part in parts)  # type: ignore[return-value]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all tokens (int32) and marks (uint8), flat and memory-mapped. Needs at least one piece.

        A mark has the bits TRAINED: predicting this token is trained; REJECTED: a pair's rejected document begins here.
        """
        return (
            np.memmap(self._file("tokens"), np.int32, mode="r"),
            np.memmap(self._file("marks"), np.uint8, mode="r"),
        )

    def delete(self) -> None:
        """Remove the two files."""
        for name in ("tokens", "marks"):
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.stem.with_suffix("." + name)


def _split(document: Encoded, length: int) -> list[Encoded]:
    """Consecutive stretches of `length` tokens, the last one shorter."""
    assert document.rejected is None, "halves of a pair say nothing; refused when the settings were composed"
    starts = range(0, len(document.tokens), length)
    return [Encoded(document.tokens[at : at + length], document.trained[at : at + length]) for at in starts]


def _marks(piece: Encoded) -> np.ndarray:
    """(T,) uint8, the bits that `Corpus.read` explains."""
    marks = piece.trained * np.uint8(TRAINED)
    if piece.rejected is not None:
        marks[piece.rejected] |= REJECTED
    return marks
