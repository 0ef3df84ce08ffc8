"""Conversations as text, and the turns of the assistant in it that are trained."""

import os
from typing import Any, NamedTuple

from distlora.config import UserError
from distlora.data.chat_template import TOOLS_ADVICE, ChatTemplate, Message
from distlora.data.formats import MASK_KEYS, Document
from distlora.data.image_records import images_of

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's thoughts; transformers hands each to the template under the first two."""


class Turn(NamedTuple):
    """A turn of the assistant in a rendered conversation."""

    message: int
    """Index among the messages."""
    start: int
    """First character that the assistant writes."""
    end: int
    """Character after the turn. Marked by the template, it may lie before the end-of-turn token."""


class Conversation(NamedTuple):
    """A conversation as text, and the turns that are trained; or, with `inverse`, the only ones that are not."""

    place: str
    text: str
    turns: tuple[Turn, ...]
    marked: bool
    """True if the template marked the turns."""
    inverse: bool
    images: tuple[str | bytes, ...] = ()
    """Paths or encoded bytes, in the order of their places in the text."""


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
        return Conversation(place, text, tuple(turns), marked=marked, inverse=inverse, images=images_of(messages))

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
        common = start + len(os.path.commonprefix([text[start:], until[start:]]))  # noqa: RUF071 (characters are meant)
        positions = [(text.rfind(token, start, common), token) for token in self._closers]
        end = max((position + len(token) for position, token in positions if position >= 0), default=None)
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
