"""The assistant's turns in the text of a chat.

A turn is what the template marks with {% generation %}, else what the conversation up to it has beyond its prompt. What
cannot be had so is refused by the document's place and the message.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distlora.config import UserError
from distlora.data.chat_template import TOOLS_ADVICE, ChatTemplate, Message
from distlora.data.conversations import MASK_KEYS, common_prefix
from distlora.data.formats import Document


class Encoded(NamedTuple):
    """A document of T tokens, or a pair: the document of the chosen answer, then that of the rejected one."""

    tokens: np.ndarray
    """(T,) int32."""
    trained: np.ndarray
    """(T,) uint8: 1 where the model is trained to predict this token, with rows.RIGHT behind a right step."""
    rejected: int | None = None
    """The first token of a pair's rejected document; None: there is one document."""
    is_good: bool | None = None
    """Whether the answer is judged good; None: it is not judged. True of a pair: each of its answers is judged."""
    record: bytes = b""
    """A prompt with the columns of its record, as a line of JSON, for rewards."""
    margin: float = 0.0
    """Margin by which a pair's rewards are to differ."""

    @classmethod
    def pair(cls, chosen: Encoded, rejected: Encoded, margin: float = 0.0) -> Encoded:
        """Return a chosen and a rejected document as one."""
        tokens = np.concatenate([chosen.tokens, rejected.tokens])
        return cls(tokens, np.concatenate([chosen.trained, rejected.trained]), len(chosen.tokens), margin=margin)

    @property
    def documents(self) -> list[slice]:
        """Return the slices of its one or two documents."""
        end = len(self.tokens)
        return [slice(0, end)] if self.rejected is None else [slice(0, self.rejected), slice(self.rejected, end)]

    def apart(self) -> list[Encoded]:
        """Return what is packed apart: both answers of a pair if they are judged, else itself."""
        if self.rejected is None or self.is_good is None:
            return [self]
        sides = zip(self.documents, (True, False), strict=True)
        return [Encoded(self.tokens[part], self.trained[part], is_good=is_good) for part, is_good in sides]

    @property
    def num_targets(self) -> int:
        """Trained tokens; the first of a document is nobody's target. 0 where a document of a pair has none."""
        counts = [int(np.count_nonzero(self.trained[document][1:])) for document in self.documents]
        return sum(counts) if all(counts) else 0

    def cut(self, length: int) -> Encoded:
        """Return the first `length` tokens.

        Both documents of a longer pair are cut to the same number of tokens, the greatest with which both fit.
        """
        if self.rejected is None:
            return self._replace(tokens=self.tokens[:length], trained=self.trained[:length])
        first, second = self.rejected, len(self.tokens) - self.rejected
        most = max(length // 2, length - min(first, second))
        kept = np.r_[0 : min(first, most), first : first + min(second, most)]
        return Encoded(self.tokens[kept], self.trained[kept], min(first, most), margin=self.margin)


class TurnTokens:
    """Tokenizes rendered conversations and finds their turns in the tokens.

    A turn's two ends are checked against the text up to them, tokenized by itself, token for token. Tokenizers cut a
    text at its special tokens first and treat the parts by themselves, so it is enough to tokenize from the last
    special token before that end: the few characters of a header, the same in every document, and so remembered.
    Tokens that are matched only after normalization or between words are no such cuts, and slow tokenizers do not say
    where in the text a token lies; with these the whole text up to the end is tokenized again.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, eot_tokens: Sequence[str] = ()) -> None:
        """`eot_tokens` may end a turn beside the special tokens. Raises UserError for one that the template lacks."""
        self._tokenizer = tokenizer
        self._template = template
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
        batch = self._tokenize([conversation.text for conversation in conversations])
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
            self._tails |= zip(new, self._tokenize(new).input_ids, strict=True)
        for conversation, tokens, tails in documents:
            yield Encoded(tokens, self._trained(conversation, tokens, tails))

    def _tokenize(self, texts: list[str]) -> Any:
        # verbose=False: a text longer than the model's context is no news here, it is cut to rows later.
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)

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


_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's thoughts; transformers hands each to the template under the first two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A turn of the assistant in a rendered conversation."""

    message: int
    """Index among the messages."""
    start: int
    """First character that the assistant writes."""
    end: int
    """Character after the turn. Marked by the template, it may lie before the end-of-turn token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A conversation as text, and the turns that are trained; or, with `inverse`, the only ones that are not."""

    place: str
    text: str
    turns: tuple[Turn, ...]
    marked: bool
    """True if the template marked the turns."""
    inverse: bool


class TurnFinder:
    """Renders conversations and finds the turns to train in their text.

    `train_on`: assistant (every turn of the assistant), last (its last turn) or all (all text). A message with
    "train": false, or 0 under another of MASK_KEYS, is never trained.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, train_on: str) -> None:
        assert train_on in ("assistant", "last", "all")
        self.template = template
        self._train_on = train_on
        self._closers = [token.content for token in tokenizer.added_tokens_decoder.values()]

    def find(self, document: Document) -> Conversation:
        """Return the assistant turns. Raises UserError for turns that the template refuses, rewrites or leaves out."""
        messages, place = document.value["messages"], document.place
        tools = document.value.get("tools") or None
        assistant_messages = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [index for index, message in enumerate(messages) if self._is_wanted(place, index, message)]
        if self._train_on == "all":
            chosen = [index for index in assistant_messages if index not in wanted]
        else:
            chosen = [index for index in assistant_messages if index in wanted]
            if self._train_on == "last":
                chosen = [index for index in chosen if index == assistant_messages[-1]]
            if chosen:  # Nothing is learned from what follows, and a template may rewrite the turn because of it.
                messages = messages[: chosen[-1] + 1]
        self.template.check_tools(place, messages, tools)
        marked = self.template.is_marked(tools)
        turns: list[Turn] = []
        if not chosen:
            text = self.template.render(place, messages, tools)
        elif marked:
            text, turns = self._by_marks(place, messages, tools, chosen)
        else:
            text, turns = self._by_prefixes(place, messages, tools, chosen)
        if reasoning := [thoughts for message in messages if (thoughts := self._thoughts(message)[1])]:
            written = "".join(text.split())
            missing = [len(thoughts) for thoughts in reasoning if "".join(thoughts.split()) not in written]
            count, characters = self.template.unwritten
            self.template.unwritten = (count + len(missing), characters + sum(missing))
        inverse = self._train_on == "all"
        if not inverse:
            for turn in turns:
                self._check_written(place, turn.message, messages[turn.message], text[turn.start : turn.end])
        return Conversation(place=place, text=text, turns=tuple(turns), marked=marked, inverse=inverse)

    def _by_marks(self, place: str, messages: list[Message], tools: Any, chosen: list[int]) -> tuple[str, list[Turn]]:
        text, spans = self.template.render_marked(place, messages, tools)
        assistant_messages = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) > len(assistant_messages):  # A turn may be marked in parts: its thoughts, its words.
            spans = _merged(spans)
        if len(spans) != len(assistant_messages):
            raise UserError(
                f"{place}: {self.template.name} marks {len(spans)} parts with {{% generation %}} for "
                f"{len(assistant_messages)} turns of the assistant; mark each turn once, or set another data.template"
            )
        turns = []
        for index, (start, end) in zip(assistant_messages, spans, strict=True):
            if index in chosen:
                turns.append(Turn(message=index, start=_after_prompt(text, self.template.prompt, start, end), end=end))
        return text, turns

    def _by_prefixes(
        self, place: str, messages: list[Message], tools: Any, chosen: list[int]
    ) -> tuple[str, list[Turn]]:
        """Return the text, and each turn from the end of its prompt to the start of the next message (inference)."""
        text = self.template.render(place, messages, tools)
        turns = []
        for index in chosen:
            if index == 0:
                raise UserError(
                    f"{place}: the conversation begins with the assistant, and {self.template.name} does not mark the "
                    'assistant\'s parts; put a user or system message before it, mask it with "train": false, or '
                    "choose a named data.template"
                )
            prompt = self.template.render(place, messages[:index], tools, prompt=True)
            end = len(text) if index == len(messages) - 1 else None
            if text.startswith(prompt) and end is None:
                end = self._end(text, self.template.render(place, messages[: index + 1], tools), len(prompt))
            if not text.startswith(prompt) or end is None:
                raise self._rewritten(place, index)
            turns.append(Turn(message=index, start=len(prompt), end=end))
        return text, turns

    def _end(self, text: str, until: str, start: int) -> int | None:
        """Return where the turn from `start` ends in `text`, given the conversation up to and including it.

        A template may close a whole conversation otherwise than a turn inside (Phi-3's adds the end of text): then the
        turn ends with the last special token that both have, if `until` has nothing but such tokens after it.
        """
        if text.startswith(until):
            return len(until)
        common = start + len(common_prefix(text[start:], until[start:]))
        found = [(text.rfind(token, start, common), token) for token in self._closers]
        end = max((position + len(token) for position, token in found if position >= 0), default=None)
        if end is None:
            return None
        rest = until[end:]
        for token in self._closers:
            rest = rest.replace(token, "")
        return None if rest.strip() else end

    def _is_wanted(self, place: str, index: int, message: Message) -> bool:
        """Return what a message's MASK_KEYS say; True without one."""
        flags = {key: bool(message[key]) for key in MASK_KEYS if message.get(key) is not None}
        wanted = all(flags.values())
        # Of other roles a flag may only say what holds anyway.
        if flags and message["role"] != "assistant" and wanted != (self._train_on == "all"):
            shown = ", ".join(f"{key}={message[key]!r}" for key in flags)
            raise UserError(
                f"{place}: messages[{index}]: {shown} on a message of the {message['role']}, but with "
                f"data.train_on={self._train_on} only the assistant's turns can be chosen one by one; remove it"
                + ("" if self._train_on == "all" else " (data.train_on=all trains all messages)")
            )
        return wanted

    def _check_written(self, place: str, index: int, message: Message, written: str) -> None:
        """Refuse a turn whose text, thoughts or calls the template does not write."""
        calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
        key, thoughts = self._thoughts(message)
        for what, text in [("content", message.get("content")), ("reasoning", thoughts)] + [
            ("call of " + name, name) for name in calls
        ]:
            # White space apart: templates trim it, and put thoughts inside of the content on lines of their own.
            if text and text.strip() not in written and "".join(text.split()) not in "".join(written.split()):
                advice = TOOLS_ADVICE if what.startswith("call of ") else "choose a data.template that does"
                remove = "remove it"
                if what == "reasoning":
                    remove = f"leave it unread (no data.reasoning_key, and data.ignore_columns=[{key}])"
                raise UserError(
                    f"{place}: messages[{index}]: {self.template.name} does not write its {what} as the data has it, "
                    f"so the model would not learn it; {remove}, or {advice}"
                )

    @staticmethod
    def _thoughts(message: Message) -> tuple[str, str | None]:
        """Return (key, text) of a message's reasoning."""
        return next(((key, message[key]) for key in _REASONING if message.get(key)), ("", None))

    def _rewritten(self, place: str, index: int) -> UserError:
        others = ["keep one assistant turn a document", "choose a named data.template"]
        if self._train_on != "last":
            others.insert(0, "set data.train_on=last")
        return UserError(
            f"{place}: messages[{index}]: {self.template.name} rewrites this turn once later ones follow, or writes it "
            "otherwise than its prompt, so what the model would be trained on is not what it sees; "
            f"{', '.join(others)}, or mark the assistant's parts in it with {{% generation %}} and "
            "{% endgeneration %}"
        )


def _after_prompt(text: str, prompt: str, start: int, end: int) -> int:
    """Return where a marked turn begins, without the header that some templates mark and inference is given."""
    for cut in range(start, min(start + len(prompt), end) + 1):
        if cut >= len(prompt) and text.startswith(prompt, cut - len(prompt)):
            return cut
    return start


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch as one."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
