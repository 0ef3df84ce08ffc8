"""The encoded documents of one data file, on disk: what lies between the tokenizer and the packing.

Memory holds some 20 bytes a document; the tokens lie in flat files, since a large data set has billions of them.
"""

from __future__ import annotations

import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distlora.data.templates import Encoded


@dataclass
class Corpus:
    """Documents cut into pieces of at most `sequence_length` tokens, in the order of the file."""

    stem: Path
    """Two files `<stem>.tokens` (int32) and `<stem>.trained` (uint8) hold the pieces, one after the other."""
    sequence_length: int
    splits_long: bool
    """Plain text: a document longer than a row becomes several pieces. Otherwise it is truncated to one."""
    _lengths: array.array[int] = field(default_factory=lambda: array.array("q"))
    _documents: array.array[int] = field(default_factory=lambda: array.array("q"))
    _truncated: array.array[int] = field(default_factory=lambda: array.array("b"))

    def append(self, encoded: Iterable[Encoded]) -> None:
        """Add documents. Pieces without a trained target are left out; a document may have none left."""
        with self._file("tokens").open("ab") as tokens_file, self._file("trained").open("ab") as trained_file:
            for tokens, trained in encoded:
                end = len(tokens) if self.splits_long else min(len(tokens), self.sequence_length)
                for start in range(0, end, self.sequence_length):
                    piece = slice(start, min(start + self.sequence_length, end))
                    if trained[piece][1:].any():  # The first token is nobody's target.
                        tokens_file.write(tokens[piece].tobytes())
                        trained_file.write(trained[piece].tobytes())
                        self._lengths.append(piece.stop - piece.start)
                        self._documents.append(len(self._truncated))
                self._truncated.append(len(tokens) > end)

    @property
    def num_documents(self) -> int:
        """Documents appended, those that left no piece included."""
        return len(self._truncated)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, (P,) int64."""
        return np.array(self._lengths, np.int64)

    @property
    def documents(self) -> np.ndarray:
        """The document that each piece is of, (P,) int64, ascending."""
        return np.array(self._documents, np.int64)

    @property
    def pieces_of(self) -> np.ndarray:
        """Pieces of each document, (num_documents,) int64; 0: dropped, since no token of it is trained."""
        return np.bincount(self.documents, minlength=self.num_documents)

    @property
    def truncated(self) -> np.ndarray:
        """Which documents lost their end, (num_documents,) bool."""
        return np.array(self._truncated, bool)

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
