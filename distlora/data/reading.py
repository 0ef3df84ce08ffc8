"""Sources to a corpus: documents in batches through the tokenizer, to the end of the sources or until there are enough.

Letters: S sources, L tokens of a row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from distlora.config import DataConfig, UserError
from distlora.data.corpus import Corpus, TooLong
from distlora.data.encoding import Encoder, PairEncoder
from distlora.data.formats import Document, Kind, check_objective, kind_of
from distlora.data.hashing import HELD_OUT, below, hash64
from distlora.data.sources import Source
from distlora.data.splits import volume

_BATCH_DOCUMENTS, _BATCH_BYTES = 1024, 2_000_000
"""Bounds of a batch for the tokenizer: enough for all its threads, small enough to bound memory."""
_STREAM_DOCUMENTS, _STREAM_BYTES = 32, 250_000
"""The same where documents are read until there are enough: what is read beyond that is waste."""
PATIENCE = 10_000
"""Documents without a token to train after which a bounded reading gives a source up: it would read to its end."""
_PROGRESS_SECONDS = 3.0


@dataclass
class Encoders:
    """The encoders by kind of document, each built for the first such document."""

    tokenizer: Any
    model_path: str
    data: DataConfig
    objective: str
    """train.objective, which must fit every source."""
    _of_kind: dict[Kind, Encoder] = field(default_factory=dict)

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that chats were rendered with instead of the tokenizer's own; None where that was used."""
        templates = [encoder.template for encoder in self._of_kind.values() if encoder.template is not None]
        return templates[0].source if templates else None

    @property
    def has_chats(self) -> bool:
        """Return whether a document was read that the chat template renders."""
        return "chat" in self._of_kind

    @property
    def has_template(self) -> bool:
        """Return whether a conversation can be rendered, which decides the form of an Alpaca record."""
        return self.data.template is not None or self.tokenizer.chat_template is not None

    def of(self, source: Source, format: str) -> tuple[Encoder | PairEncoder, TooLong]:
        """Return the encoder for a source of this (resolved) format, and the handling of documents that are too long.

        Raises UserError for a format that train.objective does not train on.
        """
        check_objective(format, self.objective, source.label)
        kind = kind_of(format, self.has_template)
        too_long = self.data.too_long
        if too_long == "auto":
            too_long = "split" if kind == "text" else "truncate"
        if kind == "preference":
            return PairEncoder(self.tokenizer, self._encoder), too_long
        return self._encoder(kind), too_long

    def _encoder(self, kind: Literal["chat", "prompt_completion", "text"]) -> Encoder:
        if kind not in self._of_kind:
            self._of_kind[kind] = Encoder(
                self.tokenizer, kind, self.model_path, template=self.data.template, train_on=self.data.train_on
            )
        return self._of_kind[kind]


def read_whole(corpus: Corpus, sources: list[Source], encoders: Encoders) -> None:
    """Append every document of every source, one source after the other."""
    for number, source in enumerate(sources):
        format, documents = source.open(encoders.has_template)
        encoder, too_long = encoders.of(source, format)
        progress = _Progress(source.label, source.total_bytes)
        for batch in _batches(documents, _BATCH_DOCUMENTS, _BATCH_BYTES):
            corpus.append(encoder.encode(batch), number, too_long)
            progress.report(batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """When a bounded reading has enough."""

    tokens: int
    """Tokens of the pieces that are trained on: rows * L, since a row holds at most L."""
    wanted: np.ndarray | None
    """(S,) float64: shares of the trained targets in a mixture, summing to 1; None: sources are read in turn."""
    until_all: bool
    """Sources that end are repeated."""
    eval_fraction: float
    seed: int


def read_enough(corpus: Corpus, sources: list[Source], encoders: Encoders, need: Need) -> np.ndarray:
    """Append documents until the training pieces suffice, and no more; (S,) bool: which sources ended before.

    Of a mixture, the source that is furthest behind its share is read next; else each in turn. Held-out documents do
    not count towards the need. Raises UserError for a source whose first PATIENCE documents have no token to train.
    """
    streams = []
    for source in sources:
        format, documents = source.open(encoders.has_template)
        streams.append((_batches(documents, _STREAM_DOCUMENTS, _STREAM_BYTES), *encoders.of(source, format)))
    num_sources = len(sources)
    ended, found = np.zeros(num_sources, bool), np.zeros(num_sources, bool)
    batches, num_documents = np.zeros(num_sources), np.zeros(num_sources, np.int64)
    sizes, tokens = np.zeros(num_sources), np.zeros(num_sources)
    progress = _Progress(", ".join(source.label for source in sources), None)
    while not ended.all() and not _suffices(corpus, need, sizes, tokens, ended):
        behind = batches if need.wanted is None else sizes / need.wanted
        number = int(np.argmin(np.where(ended, np.inf, behind)))
        parts, encoder, too_long = streams[number]
        batch = next(parts, None)
        if batch is None:
            ended[number] = True
            continue
        first_piece, first_document = corpus.num_pieces, corpus.num_documents
        corpus.append(encoder.encode(batch), number, too_long)
        lengths, targets, of_document = corpus.pieces_since(first_piece)
        hashes = hash64((HELD_OUT, need.seed, number), len(batch), start=int(num_documents[number]))
        trained = ~below(hashes, need.eval_fraction)[of_document - first_document]
        sizes[number] += targets[trained].sum()
        tokens[number] += lengths[trained].sum()
        batches[number] += 1
        num_documents[number] += len(batch)
        found[number] |= len(targets) > 0
        if num_documents[number] >= PATIENCE and not found[number]:
            raise nothing_to_train(corpus, sources[number], number, encoders.data)
        progress.report(batch)
    return ended


def nothing_to_train(corpus: Corpus, source: Source, number: int, data: DataConfig) -> UserError:
    """Why source `number`, of which no document in the corpus has a token to train, is no use, and what to change."""
    own = corpus.sources == number
    advice = "every chat needs an assistant turn, every completion and text some content"
    long = int(np.count_nonzero((corpus.truncated | corpus.dropped_long) & own))
    if long:
        fate = "left out as longer than a row" if corpus.dropped_long[own].any() else "truncated before it"
        advice = f"{long:,} were {fate}: raise {{data.sequence_length}}={data.sequence_length}"
    count = int(np.count_nonzero(own))
    which = "its first" if data.streaming and count >= PATIENCE else "its"
    return UserError(f"{source.config.path}: none of {which} {count:,} documents has a token to train; {advice}")


def _suffices(corpus: Corpus, need: Need, sizes: np.ndarray, tokens: np.ndarray, ended: np.ndarray) -> bool:
    """Return whether the documents fill the rows, or no further document could be used."""
    if need.wanted is None:
        return bool(tokens.sum() >= need.tokens)
    whole = volume(sizes, need.wanted, ended, until_all=need.until_all)
    if not need.until_all and (ended & (sizes > 0) & (sizes / need.wanted <= whole)).any():
        return True
    used = tokens * need.wanted * whole / np.maximum(sizes, 1)
    # Each source is used up to a whole piece: it may miss its part by half of one.
    return bool(used.sum() >= need.tokens + len(sizes) * corpus.sequence_length)


def _batches(documents: Iterator[Document], most_documents: int, most_bytes: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if len(batch) == most_documents or num_bytes >= most_bytes:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class _Progress:
    """A line on stderr every few seconds that says how far the tokenizing is."""

    def __init__(self, label: str, total_bytes: int | None) -> None:
        self._label = label
        self._total = total_bytes
        self._started = self._reported = time.monotonic()
        self._documents = self._bytes = 0

    def report(self, batch: list[Document]) -> None:
        self._documents += len(batch)
        self._bytes += sum(document.num_bytes for document in batch)
        now = time.monotonic()
        if now - self._reported < _PROGRESS_SECONDS:
            return
        self._reported = now
        of_total = ""
        if self._total:
            of_total = f" of {self._total / 1e6:,.1f} MB ({min(1.0, self._bytes / self._total):.0%})"
        print(
            f"tokenizing {self._label}: {self._documents:,} documents, {self._bytes / 1e6:,.1f}"
            f"{of_total or ' MB'}, {self._bytes / 1e6 / (now - self._started):.1f} MB/s",
            file=sys.stderr,
            flush=True,
        )
