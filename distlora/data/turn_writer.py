"""Write what stands between two turns of the model in a dialogue, and read the calls of tools in a turn.

Both are derived from the chat template, whatever its family is. Neither needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distlora.config import UserError, require
from distlora.config.errors import short
from distlora.data.chat_template import TOOLS_ADVICE, ChatTemplate, Message

_ANSWER = "7f3a91 an answer"
"""Content of an assistant's message that stands for any."""
_PLACE = "the turns of a dialogue"
_QUESTION: Message = {"role": "user", "content": "A question"}
MOST_LEVELS = 64
"""Most levels of lists and objects in a call; what writes them again, such as a template, recurses."""
_TOO_DEEP = f"the call has lists and objects nested to more than {MOST_LEVELS} levels"
_OTHER = "set data.template to another one (chatml)"


def call_id(number: int) -> str:
    """Return the id of a message's call; some templates take nine letters and digits alone."""
    return f"call{number:05d}"


class Call(NamedTuple):
    """A call of a tool in a message."""

    name: str
    """Name of the function; empty if the message does not tell it."""
    arguments: Mapping[str, Any]
    error: str | None = None
    """Why it cannot be made."""

    def message(self, number: int) -> Message:
        """Return it as an entry of a message's tool_calls."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": call_id(number), "type": "function", "function": function}


class CallReader:
    """Read the calls in a text of the model, in the form in which the template writes them: JSON behind a marker."""

    def __init__(self, template: ChatTemplate, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError for a template that knows no tools, or writes calls otherwise than as JSON."""
        template.check_tools("data.tools", [_QUESTION], tools)
        self._names = [tool["function"]["name"] for tool in tools]
        call = Call(self._names[0], {"value": _ANSWER})
        said = {"role": "assistant", "content": "", "tool_calls": [call.message(0)]}
        text = template.render(_PLACE, [_QUESTION, said], tools)
        text = text.removeprefix(template.render(_PLACE, [_QUESTION], tools, prompt=True))
        for place in (match.start() for match in re.finditer(r"\{", text)):
            value = _object(text, place)[0]
            names = [key for key, item in value.items() if item == call.name]
            arguments = [key for key, item in value.items() if item == call.arguments]
            if names and arguments:
                self._marker, self._name, self._arguments = text[:place].strip(), names[0], arguments[0]
                return
        raise UserError(
            f"data.tools: {template.name} writes a call otherwise than as a JSON object of a name and arguments, "
            f"which alone is read; {TOOLS_ADVICE}"
        )

    def read(self, text: str) -> list[Call]:
        """Return the calls in a text. Without a marker the text is a call if it begins with an object."""
        if not self._marker:
            return [self._call(*_object(text, 0)[::2])] if text.lstrip().startswith("{") else []
        calls = []
        for match in re.finditer(re.escape(self._marker), text):
            value, place, error = _object(text, match.end())
            calls.append(self._call(value, error))
            while text[place:].lstrip(" \n,").startswith("{"):  # A list of calls.
                value, place, error = _object(text, len(text) - len(text[place:].lstrip(" \n,")))
                calls.append(self._call(value, error))
        return calls

    def _call(self, value: Mapping[str, Any], error: str | None) -> Call:
        name, arguments = value.get(self._name), value.get(self._arguments, {})
        if error is None and (not isinstance(name, str) or not isinstance(arguments, dict)):
            error = f"a call is an object with {self._name!r} and {self._arguments!r}"
        elif error is None and name not in self._names:
            error = f"there is no such function: {short(name)}; there is {', '.join(self._names)}"
        return Call(name if isinstance(name, str) else "", arguments if isinstance(arguments, dict) else {}, error)


def _object(text: str, place: int) -> tuple[dict[str, Any], int, str | None]:
    """Return the JSON object behind a place of a text, its end, and why there is none."""
    place += len(text[place:]) - len(text[place:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
    except ValueError as error:
        return {}, len(text), f"the call is not JSON: {error}"
    except RecursionError:
        return {}, len(text), _TOO_DEEP
    if not isinstance(value, dict):
        return {}, len(text), "the call is no JSON object"
    return ({}, end, _TOO_DEEP) if _is_deep(value) else (value, end, None)


def _is_deep(value: dict[str, Any]) -> bool:
    """Return whether lists and objects are nested to more than MOST_LEVELS levels."""
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        items = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        level = [item for item in items if isinstance(item, dict | list)]
    return bool(level)


class TurnWriter:
    """Write what stands between two turns of the model as tokens.

    `tools`: definitions of data.tools; empty with data.environment. Raises UserError, when it is built, for a template
    that would write earlier turns otherwise once the dialogue goes on.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._template, self._tokenizer, self._tools = template, tokenizer, tools
        self.calls = CallReader(template, tools) if tools else None
        """Reader of the model's calls; None for an environment."""
        self._ends = template.end_of_turn()
        self._require(bool(self._ends), "ends a turn with no token of its own, so no dialogue can go on behind it")
        self._said: Message = {"role": "assistant", "content": _ANSWER}
        reply = {"role": "user", "content": "Go on."}
        if tools:
            call = Call(tools[0]["function"]["name"], {"value": _ANSWER})
            self._said |= {"content": "", "tool_calls": [call.message(0)]}
            reply |= {"role": "tool", "name": call.name, "tool_call_id": call_id(0)}
        before, behind = self._parts([reply])
        alone = self._ids(before) + self._ids(behind)
        self._require(self._ids(before + behind) == alone, "writes text whose tokens depend on the turn before it")

    def _require(self, holds: bool, fault: str) -> None:
        setting = "data.tools" if self._tools else "data.environment"
        require(holds, f"{setting}: {self._template.name} {fault}; {_OTHER}")

    def tokens(self, replies: Sequence[Message], last: int, stops: Sequence[int]) -> list[int]:
        """Return the tokens from a turn of the model, whose last token is `last`, to the next.

        `stops`: tokens that end a turn. Without one at its end, the template's is the first of the tokens returned.
        """
        ids = self._ids(self._parts(replies)[1])
        return ids if last in stops else [*self._ends, *ids]

    def _parts(self, replies: Sequence[Message]) -> tuple[str, str]:
        """Return the text up to the token that ends a turn, and the text between it and the next turn."""
        prompt = self._template.render(_PLACE, [_QUESTION], self._tools, prompt=True)
        past = self._template.render(_PLACE, [_QUESTION, self._said], self._tools)
        text = self._template.render(_PLACE, [_QUESTION, self._said, *replies], self._tools, prompt=True)
        end = self._tokenizer.convert_ids_to_tokens(self._ends[0])
        keeps = past.startswith(prompt) and text.startswith(past) and end in past[past.rfind(_ANSWER) :]
        self._require(keeps, "writes a turn otherwise once the dialogue goes on, so the model would not read its own")
        place = text.index(end, past.rindex(_ANSWER)) + len(end)
        return text[:place], text[place:]

    def _ids(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # Tokenizers raise on half a surrogate pair.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids
