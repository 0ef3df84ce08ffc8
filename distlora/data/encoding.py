"""Documents to token ids and trained tokens.

Chats: the assistant's turns. Prompt and completion: the completion and the appended end-of-text token. Plain text:
every token, with end-of-text. A pair: its two answers. A judged answer: it. Letters: T tokens of a document.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distlora.config import DataConfig, UserError
from distlora.config.objectives import OBJECTIVES
from distlora.data.answers import check_objective
from distlora.data.chat_template import ChatTemplate, start_tokens
from distlora.data.formats import SIDES, Document
from distlora.data.images import ImageSpan, ImageText
from distlora.data.json_values import shown
from distlora.data.rows import RIGHT, TRAINED
from distlora.data.sources import DataSource
from distlora.data.turn_writer import TurnWriter
from distlora.data.turns import Conversation, TurnFinder

TooLong = Literal["truncate", "drop", "split"]
_ANCHORS = ("\n", ".", "0")
"""Texts after which a completion is tokenized as a continuation; one is enough that does not join with its start."""
_LARGEST_MARGIN = 1e6
"""Bound of a pair's margin: rewards are far below it."""


class Encoded(NamedTuple):
    """A document of T tokens, or a pair: the document of the chosen answer, then that of the rejected one."""

    tokens: np.ndarray
    """(T,) int32."""
    trained: np.ndarray
    """(T,) uint8: 1 where the model is trained to predict this token, with rows.RIGHT behind a right step; rows.IMAGE
    where an embedding of an image replaces it."""
    rejected: int | None = None
    """The first token of a pair's rejected document; None: there is one document."""
    is_good: bool | None = None
    """Whether the answer is judged good; None: it is not judged. True of a pair: each of its answers is judged."""
    record: bytes = b""
    """A prompt with the columns of its record, as a line of JSON, for rewards."""
    margin: float = 0.0
    """Margin by which a pair's rewards are to differ."""
    images: tuple[ImageSpan, ...] = ()

    @classmethod
    def pair(cls, chosen: Encoded, rejected: Encoded, margin: float = 0.0) -> Encoded:
        """Return a chosen and a rejected document as one."""
        tokens, first = np.concatenate([chosen.tokens, rejected.tokens]), len(chosen.tokens)
        trained = np.concatenate([chosen.trained, rejected.trained])
        images = chosen.images + tuple(image.moved(first) for image in rejected.images)
        return cls(tokens, trained, first, margin=margin, images=images)

    @property
    def documents(self) -> list[slice]:
        """Return the slices of its one or two documents."""
        end = len(self.tokens)
        return [slice(0, end)] if self.rejected is None else [slice(0, self.rejected), slice(self.rejected, end)]

    def apart(self) -> list[Encoded]:
        """Return what is packed apart: both answers of a pair if they are judged, else itself."""
        if self.rejected is None or self.is_good is None:
            return [self]
        return [side._replace(is_good=is_good) for side, is_good in zip(self._sides, (True, False), strict=True)]

    @property
    def _sides(self) -> list[Encoded]:
        """Return the documents of a pair."""
        return [
            Encoded(
                self.tokens[side],
                self.trained[side],
                images=tuple(
                    image.moved(-side.start) for image in self.images if side.start <= image.start < side.stop
                ),
            )
            for side in self.documents
        ]

    @property
    def num_targets(self) -> int:
        """Trained tokens; the first of a document is nobody's target. 0 where a document of a pair has none."""
        counts = [int(np.count_nonzero(self.trained[document][1:] & TRAINED)) for document in self.documents]
        return sum(counts) if all(counts) else 0

    def cut(self, length: int) -> Encoded:
        """Return the first `length` tokens, or those in front of an image that these do not hold whole.

        Both documents of a longer pair are cut to the same number of tokens, the greatest with which both fit.
        """
        if self.rejected is None:
            length = min([image.start for image in self.images if image.end > length], default=length)
            images = tuple(image for image in self.images if image.end <= length)
            return self._replace(tokens=self.tokens[:length], trained=self.trained[:length], images=images)
        first, second = self.rejected, len(self.tokens) - self.rejected
        most = max(length // 2, length - min(first, second))
        chosen, rejected = (side.cut(most) for side in self._sides)
        return Encoded.pair(chosen, rejected, self.margin)


class Encoder:
    """Encodes documents of any form with one tokenizer, by the settings `data`, for train.objective=`objective`."""

    def __init__(
        self,
        tokenizer: Any,
        model_path: str,
        data: DataConfig,
        objective: str = "sft",
        images: ImageText | None = None,
    ) -> None:
        """`images`: reads the images of chats; None: there are none."""
        self.tokenizer, self.data, self.objective, self.images = tokenizer, data, objective, images
        self.needs = OBJECTIVES[objective]
        self.template: ChatTemplate | None = None
        """The chat template, from the first chat on."""
        self._model_path = model_path
        self._bos = start_tokens(tokenizer)
        self._by_key = {
            "messages": self._chats,
            "completion": self._completions,
            "text": self._texts,
            **dict.fromkeys(("chosen", "answer"), self._answers),
            "columns": self._prompts,
            "labels": self._steps,
        }
        """Methods by the key that only documents of their form have."""

    @property
    def has_template(self) -> bool:
        """Return whether a conversation can be rendered, which decides the form of an Alpaca record."""
        return self.data.template is not None or self.tokenizer.chat_template is not None

    def open(self, source: DataSource) -> tuple[str, TooLong, Iterator[Document]]:
        """Return the format of a source, the handling of documents that are too long, and all documents.

        Raises UserError for a format that train.objective does not train on.
        """
        format, documents = source.open(self.has_template, self.needs.data)
        check_objective(format, self.objective, source.label)
        too_long: TooLong = "drop" if format == "prompt_only" else "split" if format == "text" else "truncate"
        if format != "prompt_only" and self.data.too_long != "auto":
            too_long = self.data.too_long
        return format, too_long, documents

    def encode(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode a batch, in order. Raises UserError naming the place of a document that cannot be trained exactly.

        Raises it, too, for a tokenizer that cannot do the form: no chat template or not its tokens, no end-of-text.
        """
        for key, group in itertools.groupby(
            documents, lambda doc: next(key for key in self._by_key if key in doc.value)
        ):
            batch = list(group)
            for document, encoded in zip(batch, self._by_key[key](batch), strict=True):
                if self.images is not None:
                    self.images.check_places(document.place, encoded.tokens, encoded.trained)
                yield encoded

    def unread(self, source: DataSource) -> str:
        """Name the keys of a source's records that neither we nor the chat template read; empty for none."""
        counts = {
            key: count
            for key, count in source.unread.items()
            if self.template is None
            or not (key.startswith("messages.") and self.template.reads(key.removeprefix("messages.")))
        }
        return ", ".join(f"{key!a} ({count:,} records)" for key, count in sorted(counts.items()))

    @functools.cached_property
    def _chat_tokens(self) -> tuple[TurnFinder, TurnTokens]:
        template = self._opened_template()
        turns = TurnTokens(self.tokenizer, template, self.data.eot_tokens, self.images)
        return TurnFinder(self.tokenizer, template, self.data.train_on), turns

    def _opened_template(self) -> ChatTemplate:
        self.template = self.template or ChatTemplate(self.tokenizer, self._model_path, self.data.template)
        return self.template

    @functools.cached_property
    def _end(self) -> list[int]:
        """[end of text], which follows every completion and text."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {self._model_path} has no end-of-text token, so the model would never learn to "
                f'stop; set "eos_token" in {self._model_path}/tokenizer_config.json'
            )
        return [self.tokenizer.eos_token_id]

    @functools.cached_property
    def _adds_space(self) -> bool:
        """True if the tokenizer puts a space in front of every text (Llama 2's)."""
        before, after, whole = self._tokenize(["\n", "a", "\na"])
        return before + after != whole

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenize(self.tokenizer, texts).input_ids
        return ids

    def _chats(self, documents: list[Document]) -> Iterator[Encoded]:
        finder, turns = self._chat_tokens
        return turns.encode([finder.find(document) for document in documents])

    def _texts(self, documents: list[Document]) -> Iterator[Encoded]:
        for ids in self._tokenize([document.value["text"] for document in documents]):
            tokens = np.array(self._bos + ids + self._end, np.int32)
            yield Encoded(tokens, np.ones(len(tokens), np.uint8))

    def _completions(self, documents: list[Document]) -> Iterator[Encoded]:
        """Prompt and completion are tokenized apart: then the prompt is what it is at inference, token for token.

        Where the tokenizer puts a space in front of every text, they are tokenized as one text, whose beginning must be
        the prompt's tokens; where a token reaches over the boundary, `_continuation`.
        """
        prompts = self._tokenize([document.value["prompt"] for document in documents])
        joined = self._adds_space
        texts = [(document.value["prompt"] if joined else "") + document.value["completion"] for document in documents]
        for document, prompt, text in zip(documents, prompts, self._tokenize(texts), strict=True):
            completion = text
            if joined:
                goes_on = text[: len(prompt)] == prompt
                completion = text[len(prompt) :] if goes_on else self._continuation(document)
            start = len(self._bos) + len(prompt)
            tokens = np.array([*self._bos, *prompt, *completion, *self._end], np.int32)
            trained = np.ones(len(tokens), np.uint8)
            trained[:start] = 0
            yield Encoded(tokens, trained)

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

    def _answers(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode each pair of answers as one, and judged answers."""
        answers = [
            Document(f"{document.place}, {side}", document.num_bytes, document.value[side])
            for document in documents
            for side in (*SIDES, "answer")
            if side in document.value
        ]
        encoded = self.encode(answers)
        for document in documents:
            answer = next(encoded)
            if "rejected" in document.value:
                answer = Encoded.pair(answer, next(encoded), self._margin(document) if self.needs.margins else 0.0)
            is_judged = self.needs.data == "judged"
            yield answer._replace(is_good=document.value.get("good", True)) if is_judged else answer

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

    def _prompts(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode messages by the chat template up to where the assistant speaks, and texts as they are."""
        texts, starts = [], []
        own = json.loads(self.data.tool_schemas or "[]")
        for document in documents:
            prompt, tools = document.value["prompt"], document.value.get("tools") or own
            self._check_dialogue(document, prompt)
            starts.append(self._bos if isinstance(prompt, str) else [])
            if not isinstance(prompt, str):
                template = self._opened_template()
                template.check_tools(document.place, prompt, tools)
                prompt = template.render(document.place, prompt, tools, prompt=True)
            texts.append(prompt)
        for document, start, ids in zip(documents, starts, self._tokenize(texts), strict=True):
            try:
                line = json.dumps({key: document.value[key] for key in ("prompt", "columns")}, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{document.place} has a column that JSON cannot hold ({error}); leave it out with "
                    "data.ignore_columns"
                ) from error
            tokens = np.array([*start, *ids], np.int32)
            yield Encoded(tokens, np.ones(len(tokens), np.uint8), record=line.encode() + b"\n")

    def _check_dialogue(self, document: Document, prompt: Any) -> None:
        """Refuse prompts and chat templates that dialogues cannot continue (data.environment, data.tools)."""
        if not self.data.has_dialogues:
            return
        setting = "data.tools" if self.data.tools else f"data.environment={self.data.environment}"
        if isinstance(prompt, str):
            raise UserError(
                f"{document.place}: {setting} needs prompts of messages, and this one is a text; write it as "
                '{"prompt": [{"role": "user", "content": ...}]}'
            )
        if self.data.tools and document.value.get("tools"):
            raise UserError(f"{document.place} has 'tools' of its own beside {setting}; leave the key out")
        assert self._turn_writer is not None

    @functools.cached_property
    def _turn_writer(self) -> TurnWriter:
        """Writer of the turns between; building it refuses templates that no dialogue can go on with."""
        return TurnWriter(self._opened_template(), self.tokenizer, json.loads(self.data.tool_schemas or "[]"))

    def _steps(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode answers in steps: each step, then the separator, at whose last token the step is judged.

        A token's flags are those of the label at the token before it, so each document ends with one token more, which
        no label needs. With data.train_on=last only the last step of an answer has a label. The tokens are those of
        TRL's PRMTrainer. Raises UserError for a step without tokens.
        """
        separator = self._tokenize([self.data.step_separator])[0] if self.data.step_separator else []
        for document in documents:
            prompt, *steps = self._tokenize([document.value["prompt"], *document.value["completions"]])
            tokens = [*self._bos, *prompt]
            judged: dict[int, int] = {}
            for step, is_right in zip(steps, document.value["labels"], strict=True):
                tokens += [*step, *separator]
                if not step and not separator:
                    raise UserError(f"{document.place}: the tokenizer has no token for a step; leave the record out")
                if self.data.train_on == "last":
                    judged.clear()
                judged[len(tokens)] = TRAINED | RIGHT if is_right else TRAINED
            tokens.append(tokens[-1] if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id)
            trained = np.zeros(len(tokens), np.uint8)
            trained[list(judged)] = list(judged.values())
            yield Encoded(np.array(tokens, np.int32), trained)


class TurnTokens:
    """Tokenizes rendered conversations and finds their turns in the tokens.

    A turn's two ends are checked against the text up to them, tokenized by itself, token for token. Tokenizers cut a
    text at its special tokens first and treat the parts by themselves, so it is enough to tokenize from the last
    special token before that end: the few characters of a header, the same in every document, and so remembered.
    Tokens that are matched only after normalization or between words are no such cuts, and slow tokenizers do not say
    where in the text a token lies; with these the whole text up to the end is tokenized again.
    """

    def __init__(
        self, tokenizer: Any, template: ChatTemplate, eot_tokens: Sequence[str] = (), images: ImageText | None = None
    ) -> None:
        """`eot_tokens` may end a turn beside the special tokens. Raises UserError for one that the template lacks."""
        self._tokenizer = tokenizer
        self._template, self._images = template, images
        added = tokenizer.added_tokens_decoder
        self._added = np.array(sorted(added), np.int64)
        # Some tokenizers hold <|im_end|> as an added token that is not special, as they hold </tool_call>.
        special = {id for id, token in added.items() if token.special} | {tokenizer.eos_token_id}
        self._ends = np.array(
            sorted({*special, *template.end_of_turn(), *template.token_ids(eot_tokens)} - {None}), np.int64
        )
        cuts = [id for id, token in added.items() if not (token.normalized or token.single_word)]
        self._cuts = np.array(sorted(cuts) if tokenizer.is_fast else [], np.int64)
        self._tails: dict[str, list[int]] = {}

    def encode(self, conversations: list[Conversation]) -> Iterator[Encoded]:
        """Encode the turns in order. Raises UserError for a turn without tokens or without an end-of-turn token."""
        written, placed = conversations, []
        if self._images is not None:
            expanded = map(self._images.expand, written)
            conversations, placed = map(list, zip(*expanded, strict=True))
        batch = tokenize(self._tokenizer, [conversation.text for conversation in conversations])
        documents = []
        for number, conversation in enumerate(conversations):
            tokens = np.array(batch.input_ids[number], np.int32)
            encoding = batch.encodings[number] if len(self._cuts) else None
            cuts = np.flatnonzero(np.isin(tokens, self._cuts))
            # (first token, text) of what is tokenized again, for the two ends of each turn.
            tails = [
                (token, conversation.text[character:end])
                for turn in conversation.turns
                for end in (turn.start, turn.end)
                for token, character in [_last_before(encoding, cuts, end)]
            ]
            documents.append((conversation, tokens, tails))
        if len(self._tails) > 20_000:
            self._tails.clear()
        texts = dict.fromkeys(text for _, _, tails in documents for _, text in tails)
        if new := [text for text in texts if text not in self._tails]:
            self._tails |= zip(new, tokenize(self._tokenizer, new).input_ids, strict=True)
        for number, (conversation, tokens, tails) in enumerate(documents):
            trained = self._trained(conversation, tokens, tails)
            if self._images is None or not placed[number]:
                yield Encoded(tokens, trained)
                continue
            tokens, trained, images = self._images.spread(tokens, trained, placed[number], batch.encodings[number])
            self._images.check(written[number], tokens)
            yield Encoded(tokens, trained, images=images)

    def _trained(self, conversation: Conversation, tokens: np.ndarray, tails: list[tuple[int, str]]) -> np.ndarray:
        trained = np.full(len(tokens), int(conversation.inverse), np.uint8)
        ends = []
        for number, (first, text) in enumerate(tails):
            tail = self._tails[text]
            if tokens[first : first + len(tail)].tolist() != tail:
                raise UserError(
                    f"{conversation.place}: messages[{conversation.turns[number // 2].message}]: the tokenizer merges "
                    "the turn's first or last characters with those around it, so they share a token; strip "
                    'the white space around its content, choose another data.template, or mask it with "train": false'
                )
            ends.append(first + len(tail))
        closing = self._closing(conversation, tokens, ends)
        for turn, start, end in zip(conversation.turns, ends[::2], ends[1::2], strict=True):
            if conversation.inverse:
                trained[start:end] = 0
                continue
            stop = self._end_of_turn(tokens, start, end, closing)
            if stop is None:
                raise UserError(
                    f"{conversation.place}: messages[{turn.message}]: {self._template.name} ends the assistant's turn "
                    f"({conversation.text[turn.start : turn.end][-20:]!a}) without a special token of this tokenizer, "
                    "so the model would never learn to stop; have the template write {{ eos_token }} after it, or "
                    "choose a named data.template"
                )
            trained[start:stop] = 1
        return trained

    def _closing(self, conversation: Conversation, tokens: np.ndarray, ends: list[int]) -> int | None:
        """Return the special token that the template writes after the last marked turn, if nothing else can follow."""
        if not conversation.marked or conversation.inverse or not ends:
            return None
        after = tokens[ends[-1] :]
        special = after[np.isin(after, self._added)]
        return int(special[0]) if len(special) else None

    def _end_of_turn(self, tokens: np.ndarray, start: int, end: int, closing: int | None) -> int | None:
        """Return the token after the end-of-turn token; None where the turn has none.

        The model is stopped at it, so white space that the template writes after it is not trained. Where the template
        marks the turn without it, `closing` is taken in. Markers inside of a turn (</tool_call>, </think>) end nothing,
        even where they are its last tokens.
        """
        following = np.flatnonzero(np.isin(tokens[end:], self._added))
        if closing is not None and len(following):
            stop = end + int(following[0])
            if tokens[stop] == closing and self._is_blank(tokens[end:stop]):
                return stop + 1
        ending = np.flatnonzero(np.isin(tokens[start:end], self._ends))
        if len(ending):
            stop = start + int(ending[-1]) + 1
            if self._is_blank(tokens[stop:end]):
                return stop
        return None

    def _is_blank(self, tokens: np.ndarray) -> bool:
        return len(tokens) == 0 or self._tokenizer.decode(tokens.tolist()).strip() == ""


def _last_before(encoding: Any, cuts: np.ndarray, character: int) -> tuple[int, int]:
    """(token, its first character) of the last cut that begins before `character`; (0, 0) where there is none.

    `cuts` (C,) are positions in the tokens, ascending, and so are their characters.
    """

    def first_character(cut: int) -> int:
        start: int = encoding.token_to_chars(int(cut))[0]
        return start

    number = bisect.bisect_left(cuts, character, key=first_character)
    return (int(cuts[number - 1]), first_character(cuts[number - 1])) if number else (0, 0)


def tokenize(tokenizer: Any, texts: list[str]) -> Any:
    """Return transformers' BatchEncoding of texts, without special tokens around them."""
    # verbose=False: a text longer than the model's context is no news here, it is cut to rows later.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
