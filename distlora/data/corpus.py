"""The encoded documents of one or several sources, on disk: what lies between the tokenizer and the packing.

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

from distlora.data.turn_tokens import Encoded

TooLong = Literal["truncate", "drop", "split"]

_TRUNCATED, _DROPPED = 1, 2


def _integers() -> array.array[int]:
    return array.array("q")


@dataclass
class Corpus:
    """Documents cut into pieces of at most `sequence_length` tokens, in the order in which they were appended."""

    stem: Path
    """Two files `<stem>.tokens` (int32) and `<stem>.trained` (uint8) hold the pieces, one after the other."""
    sequence_length: int
    _lengths: array.array[int] = field(default_factory=_integers)
    _targets: array.array[int] = field(default_factory=_integers)
    _documents: array.array[int] = field(default_factory=_integers)
    _sources: array.array[int] = field(default_factory=_integers)
    _fates: array.array[int] = field(default_factory=lambda: array.array("b"))

    def append(self, encoded: Iterable[Encoded], source: int, too_long: TooLong) -> None:
        """Add documents of a source. Pieces without a trained target are left out; a document may have none left.

        A document longer than a row is cut to it (`truncate`), left out (`drop`) or becomes several pieces (`split`).
        """
        length = self.sequence_length
        with self._file("tokens").open("ab") as tokens_file, self._file("trained").open("ab") as trained_file:
            for tokens, trained in encoded:
                end, fate = len(tokens), 0
                if end > length and too_long != "split":
                    end, fate = (length, _TRUNCATED) if too_long == "truncate" else (0, _DROPPED)
                for start in range(0, end, length):
                    piece = slice(start, min(start + length, end))
                    # The first token is nobody's target.
                    num_targets = int(np.count_nonzero(trained[piece][1:]))
                    if num_targets:
                        tokens_file.write(tokens[piece].data)
                        trained_file.write(trained[piece].data)
                        self._lengths.append(piece.stop - piece.start)
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
        """Which documents lost their end, (D,) bool."""
        return np.array(self._fates, np.int8) == _TRUNCATED

    @property
    def dropped_long(self) -> np.ndarray:
        """Which documents were left out for their length, (D,) bool."""
        return np.array(self._fates, np.int8) == _DROPPED

    def pieces_since(self, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lengths, targets, documents) of the pieces from number `piece` on, each int64."""
        parts = (self._lengths[piece:], self._targets[piece:], self._documents[piece:])
        return tuple(np.array(part, np.int64) for part in parts)  # type: ignore[return-value]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens (int32) and trained flags (uint8), flat and memory-mapped. At least one piece must be there."""
        return (
            np.memmap(self._file("tokens"), np.int32, mode="r"),
            np.memmap(self._file("trained"), np.uint8, mode="r"),
        )

    def delete(self) -> None:
        """Remove the two files."""
        for name in ("tokens", "trained"):
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        return self.stem.with_suffix("." + name)
