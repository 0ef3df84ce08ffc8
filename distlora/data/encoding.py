"""Encode documents as token ids, and mark which tokens are trained: the second stage of the data.

Chats: the assistant's turns, by chat_template.py and turns.py. Prompt and completion: the completion and the appended
end-of-text token. Plain text: every token, with end-of-text. A preference pair: its two answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from distlora.config import UserError
from distlora.data.chat_template import ChatTemplate, start_tokens
from distlora.data.formats import Document
from distlora.data.turns import Encoded, TurnFinder, TurnTokens

_ANCHORS = ("\n", ".", "0")
"""Texts after which a completion is tokenized as a continuation; one is enough that does not join with its start."""


class Encoder:
    """Encodes batches of documents of one kind with one tokenizer.

    `template` and `train_on` are data.template and data.train_on, for chats. Raises UserError, when it is built, for a
    tokenizer that cannot do the kind: no chat template or not its tokens, no end-of-text token.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: Literal["chat", "prompt_completion", "text"],
        model_path: str,
        template: str | None = None,
        train_on: str = "assistant",
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
            self._turns = TurnTokens(tokenizer, self.template)
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
            f"{document.place}: the tokenizer joins the completion's first characters with any before them, so the "
            "completion has no tokens of its own; let the prompt end with a line break and the completion begin "
            "with a letter"
        )


class PairEncoder:
    """Encodes batches of pairs, a chosen and a rejected answer to the same prompt, by the encoders of their documents.

    `encoder_of` gives the one for chats or the one for prompts and completions. Raises UserError as they do.
    """

    def __init__(self, tokenizer: Any, encoder_of: Callable[[Literal["chat", "prompt_completion"]], Encoder]) -> None:
        self.tokenizer = tokenizer
        self.template: ChatTemplate | None = None
        """The encoder of answers, from the first conversation on."""
        self._encoder_of = encoder_of

    def encode(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode a batch, in order: each pair as one."""
        answers = [
            Document(f"{document.place}, {side}", document.num_bytes, document.value[side])
            for document in documents
            for side in ("chosen", "rejected")
        ]
        encoded = self._documents(answers)
        for chosen in encoded:
            yield Encoded.pair(chosen, next(encoded))

    def _documents(self, documents: list[Document]) -> Iterator[Encoded]:
        for is_chat, group in itertools.groupby(documents, key=lambda document: "messages" in document.value):
            encoder = self._encoder_of("chat" if is_chat else "prompt_completion")
            self.template = self.template or encoder.template
            yield from encoder.encode(list(group))
