"""The first stage: what a document is. Records of a source to documents in one of four canonical forms.

A *record* is what a file or a data set holds (a line, a row); a *document* is what the tokenizer is given. Every
record that is not what its format says is refused, by its place. Imports neither torch nor transformers nor numpy: the
launcher checks the head of the data before anything starts.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distlora.config import DATA_FORMATS, UserError, nearest
from distlora.data.conversations import alpaca_document, check_chat, kind_name, listed, sharegpt_messages

HH_ANSWER = "\n\nAssistant:"
"""Prefix of each answer in Anthropic's hh-rlhf and data sets derived from it."""


def preference_pair(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return {"chosen": document, "rejected": document} of a preference record.

    Both are {"prompt", "completion"}, or both {"messages"} and perhaps "tools", with "train": false in the turns of the
    common prompt. Texts stay texts, conversations are chats. Raises UserError for answers of two kinds, and for two
    without a prompt.
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
    """Return the messages of an answer: a list of them, a single one, or the assistant's text."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    messages = [answer] if isinstance(answer, dict) else answer
    if not isinstance(messages, list):
        raise UserError(f"{place}: {side!r} is {kind_name(answer)}, neither a string nor a list of messages; {good}")
    if any(isinstance(message, dict) and "from" in message and "role" not in message for message in messages):
        return sharegpt_messages({"conversations": messages}, f"{place}, {side}", good)["messages"]
    return messages


Kind = Literal["chat", "prompt_completion", "text", "preference"]

EXAMPLES = {
    "chat": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
    "alpaca": '{"instruction": "Translate to French.", "input": "cat", "output": "chat"}',
    "prompt_completion": '{"prompt": "The capital of France is", "completion": " Paris."}',
    "text": '{"text": "Once upon a time ..."}',
    "preference": '{"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome."}',
}
"""A good record of each format, shown with every complaint about a bad one."""

REQUIRED_KEYS = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}
OPTIONAL_KEYS = {
    "chat": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "preference": ("prompt", "tools"),
}
"""Keys that a record may have besides. Any other key is ignored."""


class Record(NamedTuple):
    """A line, row or object as its source holds it."""

    place: str
    """Place in the source: "chats.jsonl:12", "chats.parquet row 12", "org/name train row 12"."""
    num_bytes: int
    """Bytes in the source, for progress; estimated for compressed and columnar files."""
    value: Any


@dataclass(frozen=True, slots=True)
class Document:
    """A document in canonical form.

    `value` is {"messages": [...]} with an optional "tools" (chat), {"prompt": str, "completion": str} or {"text": str};
    or, of a pair, {"chosen": value, "rejected": value} with two of the first or two of the second form. A message is
    what `conversations.check_chat` lets through.
    """

    place: str
    num_bytes: int
    value: dict[str, Any]


def format_keys(format: str) -> tuple[str, ...]:
    """Return the keys that a format reads, those that it needs first."""
    return REQUIRED_KEYS[format] + OPTIONAL_KEYS.get(format, ())


def resolve_format(record: Record, format: str, columns: Mapping[str, str]) -> str:
    """`format`, or with `auto` the one whose keys this record has, after `columns` renamed them.

    Only formats that know every key of `columns` come into question. Raises UserError for a column that the record
    lacks, a key that no format reads, and a record that fits no format or several.
    """
    assert format in DATA_FORMATS
    candidates = [format] if format != "auto" else list(REQUIRED_KEYS)
    known = list(dict.fromkeys(key for name in candidates for key in format_keys(name)))
    for key in columns:
        if key not in known:
            raise UserError(
                f"data.columns: {key!r} is no key of data.format={format}{nearest(key, known)}; its keys are "
                f"{', '.join(known)} (write columns={{key: name in the data}})"
            )
    value = _object(record, format)
    for key, column in columns.items():
        if column not in value:
            raise UserError(
                f"{record.place}: data.columns names {column!r} as {key!r}, but the columns there are "
                f"{listed(value)}{nearest(column, value)}"
            )
    if format != "auto":
        return format
    renamed = _renamed(value, columns)
    fitting = [
        name
        for name, keys in REQUIRED_KEYS.items()
        if all(renamed.get(key) is not None for key in keys) and set(columns) <= set(format_keys(name))
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = f"it has {listed(renamed)}"
    if fitting:
        raise UserError(
            f"{record.place}: {found}, which fits the formats {' and '.join(fitting)}; "
            f"choose one with data.format={fitting[0]}"
        )
    advice = "name the other keys of the format in data.columns too" if columns else "rename its keys with data.columns"
    raise UserError(
        f"{record.place}: {found}, which fits no format; {advice}, as in "
        f"data.columns={_columns_example(value, columns)}. {good('auto')}"
    )


def _columns_example(value: dict[str, Any], columns: Mapping[str, str]) -> str:
    """`columns`, and for every key that a format still misses a column of the data that may hold it.

    The format is the first that knows `columns`, has one of its keys already and finds columns for the others; else
    prompt and completion, or what a lone column may be.
    """
    renamed = _renamed(value, columns)
    free = {key: item for key, item in value.items() if key not in (*columns.values(), "id", "system")}
    strings = [key for key, item in free.items() if isinstance(item, str)]
    lists = [key for key, item in free.items() if isinstance(item, list)]
    chosen: list[tuple[str, str]] = []
    for name in ("prompt_completion", "alpaca", "chat", "sharegpt"):
        missing = [key for key in REQUIRED_KEYS[name] if renamed.get(key) is None and key not in columns]
        fillers = [key for key in strings if key not in format_keys(name)]
        begun = len(missing) < len(REQUIRED_KEYS[name]) and set(columns) <= set(format_keys(name))
        if begun and (columns or len(fillers) >= len(missing)):
            chosen = list(zip(missing, [*fillers, *["NAME"] * len(missing)], strict=False))
            break
    else:
        if lists and not strings:
            chosen = [("messages", lists[0])]
        elif len(strings) == 1:
            chosen = [("text", strings[0])]
        else:
            chosen = list(zip(("prompt", "completion"), [*strings, "NAME", "NAME"], strict=False))
    return "{" + ", ".join(f"{key}: {column}" for key, column in [*columns.items(), *chosen]) + "}"


def kind_of(format: str, has_template: bool) -> Kind:
    """Return the canonical form of a resolved format. Alpaca is a chat where there is a template to render one."""
    kinds: dict[str, Kind] = {
        "chat": "chat",
        "sharegpt": "chat",
        "alpaca": "chat" if has_template else "prompt_completion",
        "prompt_completion": "prompt_completion",
        "text": "text",
        "preference": "preference",
    }
    return kinds[format]


def check_objective(format: str, objective: str, label: str) -> None:
    """Refuse a source, named `label`, whose resolved format is not what train.objective trains on."""
    is_preference = format == "preference"
    if is_preference and objective == "sft":
        raise UserError(
            f"{label} holds preference data (chosen and rejected answers), which train.objective=sft does not train "
            "on; set train.objective=dpo, or fine-tune on the chosen answers with data.columns={completion: chosen} "
            "(where they answer 'prompt'), {messages: chosen} (conversations) or {text: chosen} (whole texts)"
        )
    if not is_preference and objective == "dpo":
        raise UserError(
            f"{label} is {format}, and train.objective=dpo compares a chosen with a rejected answer; set "
            f"train.objective=sft, or use preference data: {good('preference')}"
        )


def to_document(record: Record, format: str, columns: Mapping[str, str], has_template: bool) -> Document:
    """Return a record in canonical form. Raises UserError, by place, for one that is not of this (resolved) format."""
    value, place = _renamed(_object(record, format), columns), record.place
    for key in REQUIRED_KEYS[format]:
        if key not in value:
            raise UserError(f"{place}: no {key!r} among its keys: {listed(value)}; {good(format)}")
    if format in ("chat", "sharegpt"):
        if format == "sharegpt":
            value = sharegpt_messages(value, place, good(format))
        canonical = check_chat(value, place, good(format))
    elif format == "alpaca":
        canonical = alpaca_document(value, place, good(format), as_chat=has_template)
    elif format == "preference":
        canonical = preference_pair(value, place, good(format))
    else:
        canonical = {key: _string(value, key, place, format) for key in REQUIRED_KEYS[format]}
    return Document(place, record.num_bytes, canonical)


def shown(text: str) -> str:
    """Return the start of a text, short enough for a message; ASCII, since a terminal may not show the rest."""
    text = text.strip()
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def good(format: str) -> str:
    """Return a good record of a format, or the outline of every format, as the end of a message."""
    if format in EXAMPLES:
        return f"a good line: {EXAMPLES[format]}"
    assert format in DATA_FORMATS
    outlines = ["{" + ", ".join(f'"{key}": ...' for key in keys) + "}" for keys in REQUIRED_KEYS.values()]
    return f"good lines are {', '.join(outlines[:-1])} or {outlines[-1]}"


def parse_json(text: str, place: str, format: str) -> Any:
    """Parse a JSON value. Raises UserError with the column where it breaks, or for one that Python cannot hold."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON, column {error.colno}: {error.msg} ({shown(text)}); {good(format)}"
        ) from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits; brackets nested without end.
        raise UserError(f"{place}: JSON that cannot be read: {error} ({shown(text)}); {good(format)}") from error


def _object(record: Record, format: str) -> dict[str, Any]:
    if not isinstance(record.value, dict):
        raise UserError(f"{record.place}: {kind_name(record.value)} where an object belongs; {good(format)}")
    return record.value


def _renamed(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`value` with the keys of the format in place of the columns of the data."""
    if not columns:
        return value
    taken = set(columns.values())
    rest = {key: item for key, item in value.items() if key not in taken}
    return rest | {key: value[column] for key, column in columns.items() if column in value}


def _string(value: dict[str, Any], key: str, place: str, format: str) -> str:
    item = value[key]
    if not isinstance(item, str):
        hint = ""
        if isinstance(item, list) and format == "prompt_completion":
            hint = ' (write a conversation as {"messages": [...]}, with "train": false in the turns of the prompt)'
        raise UserError(f"{place}: {key!r} is {kind_name(item)}, not a string{hint}; {good(format)}")
    return item
