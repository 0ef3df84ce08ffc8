"""The second stage: documents to token ids and which of them are trained.

Chat: the assistant's turns up to their end-of-turn token. Prompt/completion: the completion and the end-of-text token
that is appended. Plain text: every token, end-of-text appended. The tokenizer is passed in; nothing here imports
transformers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from distlora.config import UserError
from distlora.data.formats import Document

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """One document of T tokens."""

    tokens: np.ndarray
    """(T,) int32."""
    trained: np.ndarray
    """(T,) uint8: 1 where the model is trained to predict this token."""


class Encoder:
    """Encodes batches of documents of one format with one tokenizer.

    Raises UserError, when it is built, for a tokenizer that cannot do the format: no chat template, no end-of-text.
    """

    def __init__(self, tokenizer: Any, format: str, data_path: str, model_path: str) -> None:
        self.tokenizer = tokenizer
        self.data_path = data_path
        self.model_path = model_path
        self._encode = {
            "chat": self._chat,
            "prompt_completion": self._prompt_completion,
            "text": self._text,
        }[format]
        if format == "chat":
            if tokenizer.chat_template is None:
                raise UserError(
                    f"the tokenizer in {model_path} has no chat template, which data.format=chat needs; put one into "
                    f"{model_path}/chat_template.jinja, use the model's instruct variant, or write the data as "
                    "prompt/completion"
                )
            # The tracker of generation blocks maps characters to tokens, which slow tokenizers cannot.
            if _GENERATION.search(tokenizer.get_chat_template()) and tokenizer.is_fast:
                self._encode = self._chat_by_mask
            self._added = np.array(sorted(tokenizer.added_tokens_decoder), np.int64)
        elif tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {model_path} has no end-of-text token, so the model would never learn to stop; set "
                f'"eos_token" in {model_path}/tokenizer_config.json'
            )
        probe = tokenizer("a").input_ids
        adds_bos = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
        self._bos = [tokenizer.bos_token_id] if adds_bos else []

    def encode(self, documents: list[Document]) -> Iterator[Encoded]:
        """Encode a batch, in order. Raises UserError naming the line that the chat template refuses."""
        return self._encode(documents)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: a text longer than the model's context is no news here, it is cut to rows later.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids

    def _text(self, documents: list[Document]) -> Iterator[Encoded]:
        eos = [self.tokenizer.eos_token_id]
        for ids in self._tokenize([document.value["text"] for document in documents]):
            tokens = np.array(self._bos + ids + eos, np.int32)
            yield Encoded(tokens, np.ones(len(tokens), np.uint8))

    def _prompt_completion(self, documents: list[Document]) -> Iterator[Encoded]:
        """Prompt and completion are tokenized apart: then the prompt is what it is at inference, token for token."""
        prompts = self._tokenize([document.value["prompt"] for document in documents])
        completions = self._tokenize([document.value["completion"] for document in documents])
        for prompt, completion in zip(prompts, completions, strict=True):
            start = len(self._bos) + len(prompt)
            tokens = np.array([*self._bos, *prompt, *completion, self.tokenizer.eos_token_id], np.int32)
            trained = np.ones(len(tokens), np.uint8)
            trained[:start] = 0
            yield Encoded(tokens, trained)

    def _chat_by_mask(self, documents: list[Document]) -> Iterator[Encoded]:
        """The template marks the assistant's parts itself, between {% generation %} and {% endgeneration %}."""
        for document in documents:
            with _named(f"{self.data_path}:{document.line}"):
                encoded = self.tokenizer.apply_chat_template(
                    document.value["messages"],
                    return_assistant_tokens_mask=True,
                    return_dict=True,
                    tokenizer_kwargs={"verbose": False},
                )
            yield Encoded(np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], np.uint8))

    def _chat(self, documents: list[Document]) -> Iterator[Encoded]:
        """By prefix difference: a turn is what the conversation up to it has beyond its prompt, in tokens.

        Every prefix is rendered and tokenized by itself, because that is what the model sees at inference, and must
        equal the start of the whole conversation token for token. The cost grows with the number of assistant turns.
        """
        texts = [self._prefixes(document) for document in documents]
        unique = list(dict.fromkeys(text for prefixes in texts for text in prefixes))
        tokens_of = dict(zip(unique, self._tokenize(unique), strict=True))
        for document, (whole, *prefixes) in zip(documents, texts, strict=True):
            tokens = np.array(tokens_of[whole], np.int32)
            for number, prefix in enumerate(prefixes):
                if not np.array_equal(tokens[: len(tokens_of[prefix])], tokens_of[prefix]):
                    raise self._not_a_prefix(document, number // 2, whole.startswith(prefix))
            trained = np.zeros(len(tokens), np.uint8)
            for prompt, until in zip(prefixes[::2], prefixes[1::2], strict=True):
                start = len(tokens_of[prompt])
                trained[start : self._end_of_turn(tokens, start, len(tokens_of[until]))] = 1
            yield Encoded(tokens, trained)

    def _prefixes(self, document: Document) -> list[str]:
        """The whole conversation as text; then for each assistant turn what prompts it, and all up to its end."""
        messages = document.value["messages"]
        place = f"{self.data_path}:{document.line}"
        if messages[0]["role"] == "assistant":
            raise UserError(
                f"{place}: the conversation begins with the assistant, and the chat template in {self.model_path} "
                "does not mark the assistant's parts; put a user or system message before it"
            )
        with _named(place):
            texts = [self._render(messages, prompt=False)]
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    is_last = index == len(messages) - 1
                    texts.append(self._render(messages[:index], prompt=True))
                    texts.append(texts[0] if is_last else self._render(messages[: index + 1], prompt=False))
        return texts

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _end_of_turn(self, tokens: np.ndarray, start: int, end: int) -> int:
        """The end of a turn without the white space that templates write after its last special token.

        The model is stopped at the end-of-turn token, so it never writes what follows.
        """
        special = np.flatnonzero(np.isin(tokens[start:end], self._added))
        if len(special) == 0:
            return end
        after = start + int(special[-1]) + 1
        return after if self.tokenizer.decode(tokens[after:end].tolist()).strip() == "" else end

    def _not_a_prefix(self, document: Document, turn: int, in_text: bool) -> UserError:
        """Why the assistant's turn number `turn` (from 0) has no tokens of its own; its text may be `in_text`."""
        roles = [message["role"] for message in document.value["messages"]]
        index = [index for index, role in enumerate(roles) if role == "assistant"][turn]
        where = f"{self.data_path}:{document.line}: messages[{index}]"
        marks = (
            f"mark the assistant's parts with {{% generation %}} and {{% endgeneration %}} in "
            f"{self.model_path}/chat_template.jinja"
        )
        if in_text:
            return UserError(
                f"{where}: the tokenizer joins the turn's first or last characters with those around it, so it has no "
                f"tokens of its own; strip the white space around its content, or {marks}"
            )
        return UserError(
            f"{where}: the chat template in {self.model_path} rewrites this turn once later ones follow, or writes it "
            f"otherwise than its prompt, so what the model would be trained on is not what it sees; {marks}, or keep "
            "one assistant turn a line"
        )


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the line whose conversation the template refuses (raise_exception in it: roles out of order and such)."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        raise UserError(f"{place}: the chat template refuses this conversation: {error}") from error
