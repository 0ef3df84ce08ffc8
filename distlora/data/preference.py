"""Preference records in canonical form: a chosen and a rejected answer to the same prompt, each with it a document.

The forms are those that TRL reads (docs: "Dataset formats", preference): a prompt and two answers; or two whole texts
or conversations that begin alike, and what they have in common is the prompt. Imports neither torch nor numpy.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from distlora.config import UserError
from distlora.data.conversations import check_chat, kind_name, sharegpt_messages

HH_ANSWER = "\n\nAssistant:"
"""What stands before each answer in the texts of Anthropic's hh-rlhf, where many such data sets have it from."""


def preference_pair(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """{"chosen": document, "rejected": document}: both {"prompt", "completion"}, or both {"messages"} and perhaps
    "tools", with "train": false in the turns of the common prompt.

    Texts stay texts, conversations are chats. Raises UserError for answers of two kinds, and for two without a prompt.
    """
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if all(isinstance(text, str) for text in ("" if prompt is None else prompt, chosen, rejected)):
        if prompt is None:
            prompt, chosen, rejected = _common_text(chosen, rejected, place, good)
        return {side: {"prompt": prompt, "completion": text} for side, text in _sides(chosen, rejected)}
    tools = value.get("tools")
    chats = [
        check_chat({"messages": _turns(answer, side, place, good), "tools": tools}, f"{place}, {side}", good)
        for side, answer in _sides(chosen, rejected)
    ]
    asked, answers = _asked(prompt, [chat["messages"] for chat in chats], place, good)
    # What is asked is not trained, the assistant's earlier turns in it included.
    asked = [message | {"train": False} if message["role"] == "assistant" else message for message in asked]
    return {
        side: chat | {"messages": asked + answer}
        for side, chat, answer in zip(("chosen", "rejected"), chats, answers, strict=True)
    }


def _asked(prompt: Any, answers: list[list[Any]], place: str, good: str) -> tuple[list[Any], list[list[Any]]]:
    """(messages of the prompt, those of each answer behind it).

    A prompt beside whole conversations is one that these begin with, or, as a string, only a copy of one's text.
    """
    if isinstance(prompt, (list, dict)) or (prompt and all(answer[0]["role"] == "assistant" for answer in answers)):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        asked = check_chat({"messages": _turns(messages, "prompt", place, good)}, f"{place}, prompt", good)["messages"]
        if not all(answer[: len(asked)] == asked for answer in answers):
            return asked, answers
    elif prompt is not None and not isinstance(prompt, str):
        raise UserError(f"{place}: 'prompt' is {kind_name(prompt)}, neither a string nor a list of messages; {good}")
    else:
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(*answers, strict=False))
        asked = [first for first, _ in same]
    if not asked:
        raise UserError(
            f"{place}: the two conversations have no message in common and there is no 'prompt', so there is nothing "
            f"that they answer; name its column with data.columns={{prompt: NAME}}. {good}"
        )
    return asked, [answer[len(asked) :] for answer in answers]


def _sides(chosen: Any, rejected: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("chosen", chosen), ("rejected", rejected)


def _common_text(chosen: str, rejected: str, place: str, good: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that begin alike.

    The prompt ends behind the last answer mark of hh-rlhf that both have, else with the last word that both have. Where
    it ends is no matter for the loss: what is alike in both has the same probability in both, and cancels.
    """
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (characters are what is meant)
    marked = common.rfind(HH_ANSWER)
    end = marked + len(HH_ANSWER) if marked >= 0 else max(common.rfind(" "), common.rfind("\n"))
    if end <= 0:
        raise UserError(
            f"{place}: 'chosen' and 'rejected' do not begin with the same words and there is no 'prompt', so there is "
            f"nothing that they answer; name its column with data.columns={{prompt: NAME}}. {good}"
        )
    return common[:end], chosen[end:], rejected[end:]


def _turns(answer: Any, side: str, place: str, good: str) -> list[Any]:
    """The messages of an answer: a list of them, a single one, or the text of the assistant's."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    messages = [answer] if isinstance(answer, dict) else answer
    if not isinstance(messages, list):
        raise UserError(f"{place}: {side!r} is {kind_name(answer)}, neither a string nor a list of messages; {good}")
    if any(isinstance(message, dict) and "from" in message and "role" not in message for message in messages):
        return sharegpt_messages({"conversations": messages}, f"{place}, {side}", good)["messages"]
    return messages
