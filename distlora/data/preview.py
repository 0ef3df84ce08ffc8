"""Show documents as the model sees them: `distlora data preview`, and `distlora data row RUN N ...` of a run.

The preview passes the first documents of each source through the encoder and the packing of a run; nothing is cached.
Trained and special tokens are marked, and control characters are escaped.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distlora.architecture.tokens import load_tokenizer
from distlora.config import DataConfig, ModelConfig, TrainConfig, UserError
from distlora.config.file import load_config
from distlora.data.chat_template import ChatTemplate
from distlora.data.encoding import Encoded, Encoder, TooLong
from distlora.data.formats import Document
from distlora.data.packing import DROPPED, DUPLICATE, Corpus, Mixture, pack, read_image
from distlora.data.prepare import check_trainable, check_vocabulary, corpora_of, open_encoder
from distlora.data.rows import BAD, IMAGE, JUDGED, REJECTED, STARTS, TRAINED, PackedRows, open_split
from distlora.data.sources import DataSource, find_sources
from distlora.results.page import render
from distlora.system.exit_codes import BAD_INPUT, DONE

SAMPLE = 1000
"""Documents of each source that are read, unless all are asked for."""
_BATCH = 256
_HEAD, _TAIL = 450, 150
"""Tokens of a long document that are printed; a book would fill the terminal."""
_VERDICTS = {True: "good", False: "bad"}
_FATES = {"truncate": "cut off there", "drop": "left out", "split": "continued as further documents"}


@dataclass(kw_only=True)
class SourceSample:
    """Documents of one source: D that a run takes, and the refused ones."""

    source: DataSource
    format: str
    too_long: TooLong
    template: ChatTemplate | None = None
    """The template that its chats were rendered with; None without chats."""
    ended: bool = False
    """True if the source was read to its end."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(D,) tokens, and targets before anything is cut off."""
    unwritten: tuple[int, int] = (0, 0)
    """(messages, characters) of reasoning that the template does not write."""
    unread: str = ""
    """Keys that nothing reads."""
    refused: list[str] = field(default_factory=list)
    shown: list[tuple[Document, Encoded]] = field(default_factory=list)


Split = tuple[Corpus, list[SourceSample]]
"""The pieces of a split, and its sources."""


def preview(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    *,
    documents: int = 2,
    read_all: bool = False,
    no_color: bool = False,
    html: str | None = None,
) -> int:
    """Print `documents` of each source, then figures of SAMPLE documents of each, or of all.

    `html`: a file to write, a page of the same documents with their images.

    Returns the exit code: 2 where a run would refuse documents. Raises UserError for a source that cannot be read or
    has no token to train.
    """
    paint, length = _paint_for_stdout(no_color=no_color), data.sequence_length
    encoder = open_encoder(model, data, train.objective)
    with tempfile.TemporaryDirectory(prefix="distlora-preview-") as scratch:
        splits = _read(model, data, encoder, None if read_all else SAMPLE, documents, Path(scratch))
        samples = [sample for _, of_split in splits.values() for sample in of_split]
        for sample in samples:
            for document, encoded in sample.shown:
                print(*_document_lines(encoder, sample, document, encoded, length, paint), sep="\n")
        if html is not None:
            Path(html).write_text(_page(encoder.tokenizer, samples, length), "utf-8")
            print(f"wrote {html}")
        legend = "trained tokens are green" if paint.colour else "trained tokens are between [[ and ]]"
        print(paint.title(f"What is trained ({legend})"))
        for name, split in splits.items():
            for number in range(len(split[1])):
                print(*_source_lines(name, train, split, number, length), sep="\n")
            print(*_split_lines(data, train, split, is_train=name == "train"), sep="\n")
    if any(sample.refused for sample in samples):
        return BAD_INPUT
    for corpus, of_split in splits.values():  # As a run does.
        check_trainable(corpus, [sample.source if sample.ended else None for sample in of_split], data)
    return DONE


def _read(
    model: ModelConfig, data: DataConfig, encoder: Encoder, limit: int | None, shown: int, scratch: Path
) -> dict[str, Split]:
    """Encode and cut the documents of every source as a run does, by split."""
    sources = find_sources(data)
    splits: dict[str, Split] = {split: (corpus, []) for split, corpus in corpora_of(scratch, data, sources).items()}
    for split in sorted(sources):  # Held-out documents first, as a run reads them.
        corpus, samples = splits[split]
        for number, source in enumerate(sources[split]):
            format, too_long, documents = encoder.open(source if limit is None else source.head())
            sample = SourceSample(source=source, format=format, too_long=too_long)
            wanted = itertools.islice(documents, limit)
            while batch := list(itertools.islice(wanted, _BATCH)):
                corpus.append(_encoded(encoder, sample, batch, shown), number, too_long)
            sample.ended = next(documents, None) is None
            sample.unread = encoder.unread(source)
            if encoder.template is not None:  # One for all sources.
                sample.unwritten, encoder.template.unwritten = encoder.template.unwritten, (0, 0)
            samples.append(sample)
        if len(corpus.pieces):
            check_vocabulary(model, int(corpus.read()[0].max()))
    return splits


def _encoded(encoder: Encoder, sample: SourceSample, batch: list[Document], shown: int) -> Iterator[Encoded]:
    """Yield the encoded documents of a batch; note their figures and the refused ones."""
    try:
        pairs = list(zip(batch, encoder.encode(batch), strict=True))
    except UserError:
        # One by one, to see which, and how many.
        pairs = []
        for document in batch:
            try:
                pairs += zip([document], encoder.encode([document]), strict=True)
            except UserError as error:
                sample.refused.append(str(error))
                if isinstance(error.__cause__, (TimeoutError, MemoryError)):  # Of the template, as for all others.
                    raise
    if sample.format not in ("text", "prompt_completion", "steps"):
        sample.template = encoder.template
    for document, encoded in pairs:
        for document_tokens in encoded.apart():
            sample.sizes.append((len(document_tokens.tokens), document_tokens.num_targets))
            if len(sample.shown) < shown:
                if encoder.needs.data == "prompts":  # A run samples their answers and trains on those.
                    untrained = document_tokens.trained & ~np.uint8(TRAINED)
                    document_tokens = document_tokens._replace(trained=untrained)
                sample.shown.append((document, document_tokens))
        yield encoded


def _document_lines(
    encoder: Encoder, sample: SourceSample, document: Document, encoded: Encoded, length: int, paint: Paint
) -> Iterator[str]:
    """Yield a document, or both of a pair, as text with the trained tokens marked, and its images."""
    tokenizer, excess = encoder.tokenizer, len(encoded.tokens) - length
    kept = encoded.cut(length) if excess > 0 and sample.too_long != "split" else encoded
    for whole, shown, side in zip(encoded.documents, kept.documents, ("chosen", "rejected"), strict=False):
        tokens, trained = encoded.tokens[whole], encoded.trained[whole].copy()
        trained[0] &= ~np.uint8(TRAINED)  # Nothing comes before it that could predict it.
        place = document.place if encoded.rejected is None else f"{document.place}, {side}"
        if encoded.is_good is not None:
            place += f", a {_VERDICTS[encoded.is_good]} answer"
        yield paint.title(f"--- {place}: {len(tokens):,} tokens, {np.count_nonzero(trained & TRAINED):,} trained")
        end = shown.stop - shown.start
        for image in encoded.images:
            if encoder.images is not None and whole.start <= image.start < whole.stop:
                first, last = image.start - whole.start, image.end - whole.start
                lost = "" if last <= end else ", cut off"
                described = encoder.images.describe(image.image, place)
                yield f"    image at tokens {first:,} to {last - 1:,} ({last - first:,}{lost}): {described}"
        is_shown = _without_runs(trained)
        tokens, trained, end = tokens[is_shown], trained[is_shown], int(np.count_nonzero(is_shown[:end]))
        if end <= _HEAD + _TAIL:
            yield _painted(tokenizer, tokens, trained, 0, end, paint)
        else:
            yield _painted(tokenizer, tokens, trained, 0, _HEAD, paint)
            hidden = trained[_HEAD : end - _TAIL]
            count = np.count_nonzero(hidden & TRAINED)
            yield paint.title(f"--- {len(hidden):,} tokens not shown, {count:,} of them trained")
            yield _painted(tokenizer, tokens, trained, end - _TAIL, end, paint)
        if end < len(tokens) and encoded.rejected is not None:
            yield paint.title(f"--- {len(tokens) - end:,} more tokens")
    if excess > 0:
        yield paint.title(
            f"--- longer than data.sequence_length={length:,} by {excess:,} tokens: "
            f"{_FATES[sample.too_long]} (data.too_long)"
        )
    yield ""


def _source_lines(name: str, train: TrainConfig, split: Split, number: int, length: int) -> Iterator[str]:
    """Figures of one source: lengths, what is trained, what is too long, what is left out and why."""
    corpus, sample = split[0], split[1][number]
    role, amount = "training" if name == "train" else "held out", "all" if sample.ended else "the first"
    what = {"pairs": "pairs", "judged": "answers"}.get(train.needs.data, "documents")
    yield (
        f"{role}: {sample.source.label} ({sample.format}), {amount} {len(sample.sizes) + len(sample.refused):,} {what}"
        + ("" if sample.ended else "; --all reads the rest")
    )
    if sample.template is not None:
        yield f"  rendered by      {sample.template.name}"
    if sample.unwritten[0]:
        count, characters = sample.unwritten
        yield f"  not rendered     reasoning of {count:,} turns, {characters:,} characters"
    if sample.unread:
        yield f"  not read         {sample.unread}"
    if sample.refused:
        yield f"  refused          {len(sample.refused):,}, which would stop a run. The first: {sample.refused[0]}"
    if not sample.sizes:
        return
    lengths, trained = np.array(sample.sizes).T
    p95 = int(np.percentile(lengths, 95, method="higher"))
    yield (
        f"  tokens each      shortest {lengths.min():,}, median {int(np.median(lengths)):,}, 95 % up to {p95:,}, "
        f"longest {lengths.max():,}"
    )
    if train.needs.data == "prompts":
        yield f"  trained          the answers that a run samples to these prompts of {lengths.sum():,} tokens"
    else:
        yield f"  trained          {trained.sum():,} of {lengths.sum():,} tokens ({trained.sum() / lengths.sum():.1%})"
    if (long := lengths > length).any():
        lost = f", {(lengths - length)[long].sum():,} tokens lost" if sample.too_long == "truncate" else ""
        yield (
            f"  too long         {np.count_nonzero(long):,} ({long.mean():.1%}) have more than {length:,} tokens: "
            f"{_FATES[sample.too_long]} (data.too_long){lost}"
        )
    own = corpus.documents["source"] == number
    fate, duplicates = corpus.documents["fate"][own], corpus.documents["fate"][own] == DUPLICATE
    unused = (corpus.pieces_of[own] == 0) & (fate != DROPPED) & ~duplicates
    if unused.any():
        nothing = int(np.count_nonzero(unused & (trained == 0)))
        cut = int(np.count_nonzero(unused)) - nothing
        reasons = [f"{nothing:,} without a trained token"] if nothing else []
        reasons += [f"{cut:,} truncated before the first trained token"] if cut else []
        yield f"  left out         {nothing + cut:,}: {', '.join(reasons)}"
    if duplicates.any():
        yield f"  duplicates       {np.count_nonzero(duplicates):,} equal an earlier or a held-out document: left out"


def _split_lines(data: DataConfig, train: TrainConfig, split: Split, *, is_train: bool) -> Iterator[str]:
    """Figures of a split: the mixture, and what packing leaves empty."""
    (corpus, samples), length = split, data.sequence_length
    pieces, whole = corpus.pieces, all(sample.ended for sample in samples)
    if len(pieces) == 0:
        yield "  packed           no document is left to train on"
        return
    used = np.ones(len(pieces), np.int64)
    if len(samples) > 1:
        mixture = Mixture.of(data, [sample.source for sample in samples], train.seed)
        wanted = mixture.wanted if is_train else None
        if wanted is not None and whole:
            used = mixture.use_pieces(corpus, np.ones(len(corpus.documents), bool), np.ones(len(samples), bool))
        piece_sources = corpus.documents["source"][pieces["document"]]
        targets = np.bincount(piece_sources, weights=pieces["targets"] * used, minlength=len(samples))
        counted = "tokens of the prompts" if train.needs.data == "prompts" else "trained tokens"
        yield f"fraction of the {counted}" + ("" if whole else " in the documents read")
        for number, sample in enumerate(samples):
            note = f" (wanted {wanted[number]:.1%})" if wanted is not None else ""
            yield f"  {targets[number] / targets.sum():6.1%}{note}  {sample.source.label}"
    lengths = np.repeat(pieces["length"], used)
    rows = pack(np.cumsum(lengths) - lengths, lengths, length).num_rows
    yield (
        f"packed in {rows:,} sequences of {length:,} tokens, {1 - lengths.sum() / (rows * length):.1%} padding"
        + (" (the last sequences of a small sample are half empty)" if rows < 20 else "")
    )
    if is_train and whole and train.needs.data != "prompts":  # Their number depends on section `rollout`.
        steps = f"{train.total_steps(rows):,}"
        yield f"optimizer steps of a run: {steps} (train.epochs, train.max_steps, train.global_batch)"


_UNPRINTABLE = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""Control characters: a document must not move the cursor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paint:
    """Trained text in green, or between [[ and ]] where there are no colours; special tokens bold or cyan."""

    colour: bool

    def trained(self, text: str) -> str:
        """Mark trained text."""
        return text if self.colour else f"[[{text}]]"

    def stretch(self, text: str, *, trained: bool, special: bool) -> str:
        """Color a stretch of tokens."""
        code = {(True, True): "1;32", (True, False): "32", (False, True): "36"}.get((trained, special))
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code else text

    def title(self, text: str) -> str:
        """Set a title in bold."""
        return f"\x1b[1m{text}\x1b[0m" if self.colour else text


def _paint_for_stdout(*, no_color: bool) -> Paint:
    """Colours where stdout is a terminal and neither the flag nor NO_COLOR (no-color.org) is set."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal may lack a document's characters.
    return Paint(colour=not no_color and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def _painted(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray, start: int, end: int, paint: Paint) -> str:
    """Return the tokens from `start` to `end` as text, painted by stretches."""
    stretches = _stretches(tokenizer, tokens[start:end], trained[start:end])
    parts = []
    for is_trained, group in itertools.groupby(stretches, key=lambda stretch: stretch[1]):
        text = "".join(paint.stretch(text, trained=is_trained, special=special) for text, _, special in group)
        parts.append(paint.trained(text) if is_trained else text)
    return "".join(parts)


def _stretches(tokenizer: Any, tokens: np.ndarray, trained: np.ndarray) -> list[tuple[str, bool, bool]]:
    """Return the text of tokens (T,) as stretches: (text, trained, special)."""
    special = np.isin(tokens, sorted(tokenizer.added_tokens_decoder))
    kinds = (trained & TRAINED) * 2 + special
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(tokens)]
    # Some tokenizers drop the space in front of what they decode, so a stretch is what it adds to those before it.
    texts = [tokenizer.decode(tokens[:edge].tolist()) for edge in edges]
    return [
        (after[len(before) :].translate(_UNPRINTABLE), bool(kinds[edge] >= 2), bool(kinds[edge] % 2))
        for edge, (before, after) in zip(edges, itertools.pairwise(texts), strict=False)
    ]


def _without_runs(trained: np.ndarray) -> np.ndarray:
    """Return a mask (T,) of the tokens but those of images that follow one of the same image."""
    is_image = trained & IMAGE != 0
    return ~(is_image & np.append(False, is_image[:-1]))


def _page(tokenizer: Any, samples: Sequence[SourceSample], length: int) -> str:
    """Return an HTML page of the documents that are shown, cut as in a run, with their images."""
    documents = []
    for document, encoded, too_long in ((*pair, sample.too_long) for sample in samples for pair in sample.shown):
        kept = encoded if too_long == "split" else encoded.cut(length)
        edges, parts = [*(image.start for image in kept.images), len(kept.tokens)], []
        for number, (start, end) in enumerate(zip([0, *edges[:-1]], edges, strict=True)):
            content = read_image(kept.images[number - 1].image) if number else b""
            is_shown = np.flatnonzero(_without_runs(kept.trained[start:end])) + start
            parts.append((content, _stretches(tokenizer, kept.tokens[is_shown], kept.trained[is_shown])))
        documents.append((document.place, len(kept.tokens), parts))
    return render("preview.html.jinja", documents=[(*head, [(_url(c), s) for c, s in p]) for *head, p in documents])


def _url(image: bytes) -> str:
    return f"data:;base64,{base64.b64encode(image).decode()}" if image else ""


def show_rows(run_dir: str, numbers: Sequence[int], *, no_color: bool = False) -> int:
    """Print packed training sequences of a run by their numbers, from 0, and return the exit code.

    Raises UserError for one that the run does not have, and for a run without prepared data.
    """
    paint = _paint_for_stdout(no_color=no_color)
    model = load_config(run_dir).model
    rows = open_split(run_dir, "train")
    assert rows is not None, "a preparation without training rows is refused"
    wrong = [number for number in numbers if not 0 <= number < len(rows)]
    if wrong:
        raise UserError(f"there is no row {wrong[0]:,}: {run_dir} has {len(rows):,}, numbered from 0")
    tokenizer = load_tokenizer(Path(model.path), model.new_tokens, model.special_tokens)
    for number in numbers:
        for line in _row_lines(rows, number, tokenizer, paint):
            print(line)
    return DONE


def _row_lines(rows: PackedRows, number: int, tokenizer: Any, paint: Paint) -> Iterator[str]:
    """Yield the documents of one sequence, with their trained tokens marked."""
    (tokens,), (flags,) = rows.read(np.array([number]))
    trained = np.zeros(len(tokens), np.uint8)
    trained[1:] = flags[:-1] & TRAINED  # A flag is about the token that follows.
    marked = trained | (flags & IMAGE)
    starts = [*np.flatnonzero(flags & STARTS).tolist(), len(tokens)]
    yield paint.title(f"row {number:,}: {len(tokens):,} tokens, {np.count_nonzero(trained):,} trained")
    is_rejected = [*(flags & REJECTED > 0), False]
    for start, end in itertools.pairwise(starts):
        if trained[start:end].any():
            side = ", rejected" if is_rejected[start] else ", chosen" if is_rejected[end] else ""
            if flags[start] & JUDGED:
                side = f", a {_VERDICTS[flags[start] & BAD == 0]} answer"
            yield paint.title(f"--- tokens {start:,} to {end - 1:,}{side}")
            is_shown = np.flatnonzero(_without_runs(marked[start:end])) + start
            yield _painted(tokenizer, tokens[is_shown], trained[is_shown], 0, len(is_shown), paint)
        else:
            yield paint.title(f"--- tokens {start:,} to {end - 1:,}: padding")
