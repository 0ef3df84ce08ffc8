"""The assistant's turns in the tokens of a chat, and the token that ends each.

A turn's two ends must be where the text up to them, tokenized by itself as at inference, ends. What cannot be had so is
refused by the document's place and the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from distlora.config import UserError
from distlora.data.chat import ChatTemplate
from distlora.data.turns import Conversation, Turn


class Encoded(NamedTuple):
    """One document of T tokens, or a pair: the chosen answer's document and right behind it the rejected one's."""

    tokens: np.ndarray
    """(T,) int32."""
    trained: np.ndarray
    """(T,) uint8: 1 where the model is trained to predict this token."""
    rejected: int | None = None
    """The first token of a pair's rejected document; None: there is one document."""

    @classmethod
    def pair(cls, chosen: Encoded, rejected: Encoded) -> Encoded:
        tokens = np.concatenate([chosen.tokens, rejected.tokens])
        return cls(tokens, np.concatenate([chosen.trained, rejected.trained]), len(chosen.tokens))

    @property
    def documents(self) -> list[slice]:
        """Where its one or two documents lie."""
        end = len(self.tokens)
        return [slice(0, end)] if self.rejected is None else [slice(0, self.rejected), slice(self.rejected, end)]

    @property
    def num_targets(self) -> int:
        """Trained tokens; the first of a document is nobody's target. 0 where a document of a pair has none."""
        counts = [int(np.count_nonzero(self.trained[document][1:])) for document in self.documents]
        return sum(counts) if all(counts) else 0

    def cut(self, length: int) -> Encoded:
        """Its first `length` tokens; of a pair that is longer, each document up to the same number of tokens, the
        greatest with which both fit into `length`.
        """
        if self.rejected is None:
            return Encoded(self.tokens[:length], self.trained[:length])
        first, second = self.rejected, len(self.tokens) - self.rejected
        most = max(length // 2, length - min(first, second))
        kept = np.r_[0 : min(first, most), first : first + min(second, most)]
        return Encoded(self.tokens[kept], self.trained[kept], min(first, most))


class TurnTokens:
    """Tokenizes rendered conversations and finds their turns in the tokens.

    A turn's two ends are checked against the text up to them, tokenized by itself, token for token. Tokenizers cut a
    text at its special tokens first and treat the parts by themselves, so it is enough to tokenize from the last
    special token before that end: the few characters of a header, the same in every document, and so remembered.
    Tokens that are matched only after normalization or between words are no such cuts, and slow tokenizers do not say
    where in the text a token lies; with these the whole text up to the end is tokenized again.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.added_tokens_decoder
        self._added = np.array(sorted(added), np.int64)
        self._ends = np.array(sorted(_end_tokens(tokenizer, template)), np.int64)
        cuts = [id for id, token in added.items() if not (token.normalized or token.single_word)]
        self._cuts = np.array(sorted(cuts) if tokenizer.is_fast else [], np.int64)
        self._tails: dict[str, list[int]] = {}

    def encode(self, conversations: list[Conversation]) -> Iterator[Encoded]:
        """In order. Raises UserError for a turn without tokens of its own, and for one without an end-of-turn token."""
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
        self._learn([text for _, _, tails in documents for _, text in tails])
        for conversation, tokens, tails in documents:
            yield Encoded(tokens, self._trained(conversation, tokens, tails))

    def _tokenize(self, texts: list[str]) -> Any:
        # verbose=False: a text longer than the model's context is no news here, it is cut to rows later.
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)

    def _learn(self, texts: list[str]) -> None:
        """Tokenize the tails that are not known yet."""
        if len(self._tails) > 20_000:
            self._tails.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._tails]
        if new:
            self._tails |= zip(new, self._tokenize(new).input_ids, strict=True)

    def _trained(self, conversation: Conversation, tokens: np.ndarray, tails: list[tuple[int, str]]) -> np.ndarray:
        trained = np.full(len(tokens), int(conversation.inverse), np.uint8)
        ends = []
        for number, (first, text) in enumerate(tails):
            tail = self._tails[text]
            if tokens[first : first + len(tail)].tolist() != tail:
                raise self._refuse_joined(conversation, conversation.turns[number // 2])
            ends.append(first + len(tail))
        closing = self._closing(conversation, tokens, ends)
        for turn, start, end in zip(conversation.turns, ends[::2], ends[1::2], strict=True):
            if conversation.inverse:
                trained[start:end] = 0
                continue
            stop = self._end_of_turn(tokens, start, end, closing)
            if stop is None:
                raise self._unclosed(conversation, turn)
            trained[start:stop] = 1
        return trained

    def _closing(self, conversation: Conversation, tokens: np.ndarray, ends: list[int]) -> int | None:
        """The special token that the template writes after the last turn it marks, where nothing else can follow."""
        if not conversation.marked or conversation.inverse or not ends:
            return None
        after = tokens[ends[-1] :]
        special = after[np.isin(after, self._added)]
        return int(special[0]) if len(special) else None

    def _end_of_turn(self, tokens: np.ndarray, start: int, end: int, closing: int | None) -> int | None:
        """The token after the end-of-turn token; None where the turn has none.

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

    def _refuse_joined(self, conversation: Conversation, turn: Turn) -> UserError:
        return UserError(
            f"{conversation.place}: messages[{turn.message}]: the tokenizer joins the turn's first or last characters "
            "with those around it, so it has no tokens of its own; strip the white space around its content, choose "
            'another data.template, or mask it with "train": false'
        )

    def _unclosed(self, conversation: Conversation, turn: Turn) -> UserError:
        shown = conversation.text[turn.start : turn.end][-20:]
        return UserError(
            f"{conversation.place}: messages[{turn.message}]: {self._template.name} ends the assistant's turn "
            f"({shown!a}) without a special token of this tokenizer, so the model would never learn to stop; "
            "have the template write {{ eos_token }} after it, or choose a named data.template"
        )


def _end_tokens(tokenizer: Any, template: ChatTemplate) -> set[int]:
    """Tokens that can end a turn: the special ones, and what the template writes behind a plain answer.

    Some tokenizers hold <|im_end|> as an added token that is not special, as they hold </tool_call>.
    """
    added = tokenizer.added_tokens_decoder
    special = {id for id, token in added.items() if token.special} | {tokenizer.eos_token_id}
    behind = tokenizer(template.behind_answer(), add_special_tokens=False).input_ids
    return (special | set([token for token in behind if token in added][:1])) - {None}


def _last_before(encoding: Any, cuts: np.ndarray, character: int) -> tuple[int, int]:
    """(token, its first character) of the last cut that begins before `character`; (0, 0) where there is none.

    `cuts` (C,) are positions in the tokens, ascending, and so are their characters.
    """
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        if encoding.token_to_chars(int(cuts[middle]))[0] < character:
            low = middle + 1
        else:
            high = middle
    return (int(cuts[low - 1]), encoding.token_to_chars(int(cuts[low - 1]))[0]) if low else (0, 0)
