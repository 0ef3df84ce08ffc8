"""Documents to token ids and trained tokens, and sources to a corpus: in batches, whole or until there are enough.

Chats: the assistant's turns, by chat_template.py and turns.py. Prompt and completion: the completion and the appended
end-of-text token. Plain text: every token, with end-of-text. A preference pair: its two answers. A judged answer: it.
Letters: S sources, L tokens of a row.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from distlora.config import DataConfig, UserError
from distlora.config.objectives import OBJECTIVES, DataForm
from distlora.data.chat_template import ChatTemplate, start_tokens
from distlora.data.formats import Document, Kind, check_objective, kind_of, shown
from distlora.data.packing import HELD_OUT, Corpus, TooLong, below, hash64, volume
from distlora.data.rows import RIGHT, TRAINED
from distlora.data.sources import Source
from distlora.data.turns import Encoded, TurnFinder, TurnTokens

_ANCHORS = ("\n", ".", "0")
"""Texts after which a completion is tokenized as a continuation; one is enough that does not join with its start."""


class Encoder:
    """Encodes batches of documents of one kind with one tokenizer.

    `template`, `train_on` and `eot_tokens` are settings of data, for chats. Raises UserError, when it is built, for a
    tokenizer that cannot do the kind: no chat template or not its tokens, no end-of-text token.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: Literal["chat", "prompt_completion", "text"],
        model_path: str,
        template: str | None = None,
        train_on: str = "assistant",
        eot_tokens: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.template: ChatTemplate | None = None
        """The chat template; None for other kinds."""
        self._encode = {
            "chat": self._chat,
            "prompt_completion": self._prompt_completion,
            "text": self._text,
        }[kind]
        if kind == "chat":
            self.template = ChatTemplate(tokenizer, model_path, template)
            self._finder = TurnFinder(tokenizer, self.template, train_on)
            self._turns = TurnTokens(tokenizer, self.template, eot_tokens)
        elif tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {model_path} has no end-of-text token, so the model would never learn to stop; set "
                f'"eos_token" in {model_path}/tokenizer_config.json'
            )
        self._bos = start_tokens(tokenizer)
        apart = self._tokenize(["\n", "a", "\na"])
        self._adds_space = apart[0] + apart[1] != apart[2]

    def encode(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode a batch, in order. Raises UserError naming the place of a document that cannot be trained exactly."""
        return self._encode(documents)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: a text longer than the model's context is no news here, it is cut to rows later.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids

    def _chat(self, documents: list[Document]) -> Iterator[Encoded]:
        return self._turns.encode([self._finder.find(document) for document in documents])

    def _text(self, documents: list[Document]) -> Iterator[Encoded]:
        eos = [self.tokenizer.eos_token_id]
        for ids in self._tokenize([document.value["text"] for document in documents]):
            tokens = np.array(self._bos + ids + eos, np.int32)
            yield Encoded(tokens, np.ones(len(tokens), np.uint8))

    def _prompt_completion(self, documents: list[Document]) -> Iterator[Encoded]:
        """Prompt and completion are tokenized apart: then the prompt is what it is at inference, token for token."""
        prompts = self._tokenize([document.value["prompt"] for document in documents])
        completions = self._completions(documents, prompts)
        for prompt, completion in zip(prompts, completions, strict=True):
            start = len(self._bos) + len(prompt)
            tokens = np.array([*self._bos, *prompt, *completion, self.tokenizer.eos_token_id], np.int32)
            trained = np.ones(len(tokens), np.uint8)
            trained[:start] = 0
            yield Encoded(tokens, trained)

    def _completions(self, documents: list[Document], prompts: list[list[int]]) -> list[list[int]]:
        """Return the completions' tokens, as those of texts that go on.

        Where the tokenizer puts a space in front of every text (Llama 2's), prompt and completion are tokenized as one
        text, whose beginning must be the prompt's tokens; where a token reaches over the boundary, `_continuation`.
        """
        if not self._adds_space:
            return self._tokenize([document.value["completion"] for document in documents])
        wholes = self._tokenize([document.value["prompt"] + document.value["completion"] for document in documents])
        return [
            whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._continuation(document)
            for document, prompt, whole in zip(documents, prompts, wholes, strict=True)
        ]

    def _continuation(self, document: Document) -> list[int]:
        """Tokens of a completion where a text goes on, whatever comes before it."""
        completion = document.value["completion"]
        anchored = self._tokenize([text for anchor in _ANCHORS for text in (anchor, anchor + completion)])
        for before, whole in zip(anchored[::2], anchored[1::2], strict=True):
            if whole[: len(before)] == before:
                return whole[len(before) :]
        raise UserError(
            f"{document.place}: the tokenizer merges the completion's first characters with the prompt's last ones, so "
            "they share a token; let the prompt end with a line break and the completion begin "
            "with a letter"
        )


_LARGEST_MARGIN = 1e6
"""Bound of a pair's margin: rewards are far below it."""


class AnswerEncoder:
    """Encodes batches of pairs, a chosen and a rejected answer to the same prompt, and of answers that are judged.

    `encoder_of` gives the encoder for chats or the one for prompts and completions. `margins`: the objective reads a
    record's margin. `judges`: the answers of a pair are judged, and not compared. Raises UserError as the encoders of
    their documents do, and for a margin that is not a number.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder_of: Callable[[Literal["chat", "prompt_completion"]], Encoder],
        *,
        margins: bool = False,
        judges: bool = False,
    ) -> None:
        self.tokenizer, self._margins, self.judges = tokenizer, margins, judges
        self.template: ChatTemplate | None = None
        """The encoder of answers, from the first conversation on."""
        self._encoder_of = encoder_of

    def encode(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode a batch, in order: each pair as one."""
        answers = [
            Document(f"{document.place}, {side}", document.num_bytes, document.value[side])
            for document in documents
            for side in ("chosen", "rejected", "answer")
            if side in document.value
        ]
        encoded = self._documents(answers)
        for document in documents:
            answer = next(encoded)
            if "rejected" in document.value:
                answer = Encoded.pair(answer, next(encoded), self._margin(document) if self._margins else 0.0)
            yield answer._replace(is_good=document.value.get("good", True)) if self.judges else answer

    @staticmethod
    def _margin(document: Document) -> float:
        margin = document.value.get("margin")
        if margin is None:
            return 0.0
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < _LARGEST_MARGIN:
            raise UserError(
                f"{document.place}: 'margin' is {shown(repr(margin))}, not a number by which the two rewards are to "
                "differ; correct it, or leave the key unread with data.ignore_columns=[margin]"
            )
        return float(margin)

    def _documents(self, documents: list[Document]) -> Iterator[Encoded]:
        for is_chat, group in itertools.groupby(documents, key=lambda document: "messages" in document.value):
            encoder = self._encoder_of("chat" if is_chat else "prompt_completion")
            self.template = self.template or encoder.template
            yield from encoder.encode(list(group))


class PromptOnlyEncoder:
    """Encodes batches of prompts: messages by the chat template up to where the assistant speaks, texts as they are.

    Raises UserError for messages where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, model_path: str, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: ChatTemplate | None = None
        """The chat template, from the first messages on."""
        self._template_of = lambda: ChatTemplate(tokenizer, model_path, template)
        self._bos = start_tokens(tokenizer)

    def encode(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode a batch, in order."""
        texts, starts = [], []
        for document in documents:
            prompt, tools = document.value["prompt"], document.value.get("tools")
            starts.append(self._bos if isinstance(prompt, str) else [])
            if not isinstance(prompt, str):
                self.template = self.template or self._template_of()
                self.template.check_tools(document.place, prompt, tools)
                prompt = self.template.render(document.place, prompt, tools, prompt=True)
            texts.append(prompt)
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        for document, start, tokens in zip(documents, starts, ids, strict=True):
            try:
                line = json.dumps({key: document.value[key] for key in ("prompt", "columns")}, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{document.place} has a column that JSON cannot hold ({error}); leave it out with "
                    "data.ignore_columns"
                ) from error
            whole = np.array([*start, *tokens], np.int32)
            yield Encoded(whole, np.ones(len(whole), np.uint8), record=line.encode() + b"\n")


class StepsEncoder:
    """Encodes batches of answers in steps: each step, then the separator, at whose last token the step is judged.

    A token's flags are those of the label at the token before it, so each document ends with one token more, which no
    label needs. `last_only`: only the last step of an answer has a label. The tokens are those of TRL's PRMTrainer.
    """

    template = None

    def __init__(self, tokenizer: Any, separator: str, *, last_only: bool) -> None:
        self.tokenizer, self._last_only = tokenizer, last_only
        self._bos = start_tokens(tokenizer)
        (self._separator,) = self._tokenize([separator]) if separator else ([],)

    def encode(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode a batch, in order. Raises UserError for a step without tokens."""
        for document in documents:
            prompt, *steps = self._tokenize([document.value["prompt"], *document.value["completions"]])
            tokens = [*self._bos, *prompt]
            judged: dict[int, int] = {}
            for step, is_right in zip(steps, document.value["labels"], strict=True):
                tokens += [*step, *self._separator]
                if not step and not self._separator:
                    raise UserError(f"{document.place}: the tokenizer has no token for a step; leave the record out")
                if self._last_only:
                    judged.clear()
                judged[len(tokens)] = TRAINED | RIGHT if is_right else TRAINED
            tokens.append(tokens[-1] if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id)
            trained = np.zeros(len(tokens), np.uint8)
            trained[list(judged)] = list(judged.values())
            yield Encoded(np.array(tokens, np.int32), trained)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids
        return ids


_BATCH_DOCUMENTS, _BATCH_BYTES = 1024, 2_000_000
"""Bounds of a batch for the tokenizer: enough for all its threads, small enough to bound memory."""
_STREAM_DOCUMENTS, _STREAM_BYTES = 32, 250_000
"""The same where documents are read until there are enough: what is read beyond that is waste."""
PATIENCE = 10_000
"""Documents without a token to train after which a bounded reading gives a source up: it would read to its end."""
_PROGRESS_SECONDS = 3.0


AnyEncoder = Encoder | AnswerEncoder | PromptOnlyEncoder | StepsEncoder


@dataclass
class Encoders:
    """The encoders by kind of document, each built for the first such document."""

    tokenizer: Any
    model_path: str
    data: DataConfig
    objective: str
    """train.objective, which must fit every source."""
    _of_kind: dict[Kind, Encoder | PromptOnlyEncoder] = field(default_factory=dict)

    @property
    def template(self) -> ChatTemplate | None:
        """The template that chats were rendered with; None without chats."""
        return next((encoder.template for encoder in self._of_kind.values() if encoder.template is not None), None)

    def unread(self, source: Source) -> str:
        """Name the keys of a source's records that neither we nor the chat template read; empty for none."""
        template = self.template
        counts = {
            key: count
            for key, count in source.unread.items()
            if template is None or not (key.startswith("messages.") and template.reads(key.removeprefix("messages.")))
        }
        return ", ".join(f"{key!a} ({count:,} records)" for key, count in sorted(counts.items()))

    @property
    def form(self) -> DataForm:
        """Return what a record is to the objective."""
        return OBJECTIVES[self.objective].data

    @property
    def has_template(self) -> bool:
        """Return whether a conversation can be rendered, which decides the form of an Alpaca record."""
        return self.data.template is not None or self.tokenizer.chat_template is not None

    def of(self, source: Source, format: str) -> tuple[AnyEncoder, TooLong]:
        """Return the encoder for a source of this (resolved) format, and the handling of documents that are too long.

        Raises UserError for a format that train.objective does not train on.
        """
        check_objective(format, self.objective, source.label)
        kind = kind_of(format, self.has_template)
        too_long = self.data.too_long
        if too_long == "auto":
            too_long = "split" if kind == "text" else "truncate"
        if kind == "steps":
            last_only = self.data.train_on == "last"
            return StepsEncoder(self.tokenizer, self.data.step_separator, last_only=last_only), too_long
        if kind == "prompt_only":
            made = PromptOnlyEncoder(self.tokenizer, self.model_path, self.data.template)
            return self._of_kind.setdefault(kind, made), "drop"
        if kind == "preference" or self.form == "judged":
            needs = OBJECTIVES[self.objective]
            judges = needs.data == "judged"
            return AnswerEncoder(self.tokenizer, self._encoder, margins=needs.margins, judges=judges), too_long
        return self._encoder(kind), too_long

    def _encoder(self, kind: Literal["chat", "prompt_completion", "text"]) -> Encoder:
        if kind not in self._of_kind:
            data = self.data
            self._of_kind[kind] = Encoder(
                self.tokenizer, kind, self.model_path, data.template, data.train_on, data.eot_tokens
            )
        encoder = self._of_kind[kind]
        assert isinstance(encoder, Encoder)
        return encoder


def read_whole(corpus: Corpus, sources: list[Source], encoders: Encoders) -> None:
    """Append every document of every source, one source after the other."""
    for number, source in enumerate(sources):
        format, documents = source.open(encoders.has_template, encoders.form)
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
        format, documents = source.open(encoders.has_template, encoders.form)
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
        lengths, targets, piece_documents = corpus.pieces_since(first_piece)
        hashes = hash64((HELD_OUT, need.seed, number), len(batch), start=int(num_documents[number]))
        trained = ~below(hashes, need.eval_fraction)[piece_documents - first_document]
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
    if int(np.count_nonzero(corpus.duplicates & own)) == int(np.count_nonzero(own)):
        return UserError(
            f"{source.config.path}: every document equals an earlier or a held-out one; leave the source out, or set "
            "data.deduplicate=false"
        )
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
        done = f"{self._documents:,} documents, {self._bytes / 1e6:,.1f} MB"
        if self._total:
            done += f" of {self._total / 1e6:,.1f} MB"
        rate = self._bytes / 1e6 / (now - self._started)
        print(f"tokenizing {self._label}: {done}, {rate:.1f} MB/s", file=sys.stderr, flush=True)
