"""The first stage: records of a source to documents in one of five canonical forms.

A *record* is what a file or a data set holds (a line, a row); a *document* is what the tokenizer is given. A record
that is not what its format says is refused by its place. Imports neither torch nor transformers nor numpy: the launcher
checks the head of the data before anything starts.

Canonical chats and pairs are conversations.py's.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from distlora.config import DATA_FORMATS, UserError, nearest
from distlora.config.objectives import OBJECTIVES, PAIRS, objectives_of, takes_format
from distlora.data.conversations import (
    CONVERSATION_KEYS,
    MESSAGE_KEYS,
    NOT_TRAINED,
    PAIR_NAMES,
    PREFERENCE_KEYS,
    SIDES,
    VERDICT_KEYS,
    alpaca_document,
    check_chat,
    check_meaning,
    expect,
    is_prompt,
    judged_answer,
    kind_name,
    labelled_steps,
    listed,
    preference_pair,
    prompt_only,
    sharegpt_messages,
)

Kind = Literal["chat", "prompt_completion", "text", "preference", "prompt_only", "steps"]

EXAMPLES = {
    "chat": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
    "alpaca": '{"instruction": "Translate to French.", "input": "cat", "output": "chat"}',
    "prompt_completion": '{"prompt": "The capital of France is", "completion": " Paris."}',
    "text": '{"text": "Once upon a time ..."}',
    "preference": '{"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome."}',
    "prompt_only": '{"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5"}',
    "steps": '{"prompt": "What is 2 + 3 + 4?", "completions": ["2 + 3 = 5.", "5 + 4 = 8."], "labels": [true, false]}',
}
"""A good record of each format, shown with every complaint about a bad one."""
JUDGED_EXAMPLE = '{"prompt": "The capital of France is", "completion": " Paris.", "label": true}'
"""A good record of an answer that is judged, which any format but text can hold."""

REQUIRED_KEYS = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "prompt_only": ("prompt",),
    "steps": ("prompt", "completions", "labels"),
}
OPTIONAL_KEYS = {
    "chat": ("system", "tools", "label"),
    "sharegpt": ("system", "tools", "label"),
    "alpaca": ("input", "system", "history", "label"),
    "prompt_completion": ("label",),
    "preference": ("prompt", "system", "tools", "margin"),
    "prompt_only": ("system", "tools"),
}
"""Keys that a record may have besides; "label" only where answers are judged. Any other key is ignored and counted, but
a prompt_only record keeps it for rewards."""


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

    `value` is {"messages": [...]} with an optional "tools" (chat), {"prompt": str, "completion": str}, {"text": str} or
    {"prompt": str or messages, "columns": {...}} with an optional "tools"; or, of a pair, {"chosen": value, "rejected":
    value, "margin": any} with two of the first or two of the second form; of a judged answer, {"answer": value, "good":
    bool} with one of them; or {"prompt": str, "completions": [str, ...], "labels": [bool, ...]}. A message is what
    `conversations.check_chat` lets through. `unread`: keys of the record that nothing reads, and of its messages those
    that only a template may read, as "messages.KEY".
    """

    place: str
    num_bytes: int
    value: dict[str, Any]
    unread: Set[str] = frozenset()


def format_keys(format: str) -> tuple[str, ...]:
    """Return the keys that a format reads, those that it needs first."""
    return REQUIRED_KEYS[format] + OPTIONAL_KEYS.get(format, ())


class Reading(NamedTuple):
    """Settings of these names, by which the records of a source are read."""

    columns: Mapping[str, str] = MappingProxyType({})
    ignore_columns: Sequence[str] = ()
    reasoning_key: str | None = None
    judged: bool = False
    """True if the objective learns from single answers that are judged."""


AS_WRITTEN = Reading()


def resolve_format(record: Record, format: str, reading: Reading = AS_WRITTEN) -> str:
    """`format`, or with `auto` the one whose keys this record has, after `columns` renamed them.

    Only formats that know every key of `columns` come into question. Raises UserError for a column that the record
    lacks, a key that no format reads, and a record that fits no format or several.
    """
    assert format in DATA_FORMATS
    columns = reading.columns
    candidates = [format] if format != "auto" else list(REQUIRED_KEYS)
    known = list(dict.fromkeys(key for name in candidates for key in format_keys(name)))
    for key in columns:
        if key not in known:
            raise UserError(
                f"data.columns: {key!r} is not a key of data.format={format}{nearest(key, known)}; its keys are "
                f"{', '.join(known)} (write columns={{key: name in the data}})"
            )
    value = _object(record, format)
    for key, column in columns.items():
        if column not in value:
            raise UserError(
                f"{record.place}: data.columns names {column!r} as {key!r}, but the columns there are "
                f"{listed(value)}{nearest(column, value)}"
            )
    renamed = _read(value, reading)
    if format == "prompt_completion" and isinstance(value.get(columns.get("prompt", "prompt")), list):
        return "chat" if "messages" in renamed else format  # _read has joined the messages of both.
    if format != "auto":
        return format
    fitting = [
        name
        for name, keys in REQUIRED_KEYS.items()
        if all(renamed.get(key) is not None for key in keys) and set(columns) <= set(format_keys(name))
    ]
    if fitting in (["chat", "preference"], ["sharegpt", "preference"]) and is_prompt(
        renamed[CONVERSATION_KEYS[fitting[0]]]
    ):
        return "preference"  # The conversation of LLaMA-Factory's and Axolotl's pairs is their prompt.
    fitting = [name for name in fitting if name != "prompt_only"] or fitting  # Every prompt may be one.
    if len(fitting) == 1:
        return fitting[0]
    found = f"it has {listed(renamed)}"
    if fitting:
        raise UserError(
            f"{record.place}: {found}, which fits the formats {' and '.join(fitting)}; "
            f"choose one with {' or '.join(f'data.format={name}' for name in fitting)}"
        )
    if "input_ids" in renamed:
        raise UserError(f"{record.place}: {found}: tokenized data is not supported; give the texts that it was made of")
    raise UserError(
        f"{record.place}: {found}, which fits no format; name the columns of all keys of a format, as in "
        f"data.columns={{prompt: question, completion: answer}}. {good('auto')}"
    )


def kind_of(format: str, has_template: bool) -> Kind:
    """Return the canonical form of a resolved format. Alpaca is a chat where there is a template to render one."""
    kinds: dict[str, Kind] = {
        "chat": "chat",
        "sharegpt": "chat",
        "alpaca": "chat" if has_template else "prompt_completion",
        "prompt_completion": "prompt_completion",
        "text": "text",
        "preference": "preference",
        "prompt_only": "prompt_only",
        "steps": "steps",
    }
    return kinds[format]


def check_objective(format: str, objective: str, label: str) -> None:
    """Refuse a source, named `label`, whose resolved format is not what train.objective trains on."""
    if takes_format(objective, format):
        return
    others = " or ".join(objectives_of(format))
    if format in PAIRS:
        raise UserError(
            f"{label} holds preference data (chosen and rejected answers), which train.objective={objective} does not "
            f"train on; set train.objective={others}, or fine-tune on the chosen answers with data.columns="
            "{completion: chosen} (where they answer 'prompt'), {messages: chosen} (conversations) or {text: chosen} "
            "(whole texts)"
        )
    needed = OBJECTIVES[objective].data
    if needed == "prompts":
        raise UserError(
            f"{label} is {format}, and train.objective={objective} {OBJECTIVES[objective].summary}; set "
            f"data.format=prompt_only to take its prompts: {good('prompt_only')}"
        )
    use = "give each prompt its answer"
    if needed in ("pairs", "steps"):
        use = f"use such data: {good('preference' if needed == 'pairs' else 'steps')}"
    if needed == "judged":
        use = f"use data with answers that are judged: a good line: {JUDGED_EXAMPLE}"
    raise UserError(
        f"{label} is {format}, and train.objective={objective} {OBJECTIVES[objective].summary}; set train.objective="
        f"{others}, or {use}"
    )


def to_document(record: Record, format: str, has_template: bool, reading: Reading = AS_WRITTEN) -> Document:
    """Return a record in canonical form. Raises UserError, by place, for one that is not of this (resolved) format."""
    is_prompt_only, is_judged = format == "prompt_only", reading.judged and format != "preference"
    value, place = _read(_object(record, format), reading, is_prompt_only=is_prompt_only), record.place
    if is_prompt_only:
        canonical = prompt_only(value, place, good(format))
        return Document(place, record.num_bytes, canonical, _unread(value, value.keys()))
    check_meaning(value, place, NOT_TRAINED.keys() - {*VERDICT_KEYS} if is_judged else NOT_TRAINED.keys())
    if value.get("tools") and "tools" not in format_keys(format):
        raise UserError(
            f"{place}: 'tools' belongs to a chat, and data.format={format} has none; write the record as "
            '{"messages": [...], "tools": [...]}, or leave the key unread with data.ignore_columns=[tools]'
        )
    for key in REQUIRED_KEYS[format]:
        if key not in value:
            raise UserError(f"{place}: no {key!r} among its keys: {listed(value)}; {good(format)}")
    if format in ("chat", "sharegpt"):
        if format == "sharegpt":
            value = value | sharegpt_messages(value, place, good(format))
        canonical = check_chat(value, place, good(format))
        system, messages = value.get("system"), canonical["messages"]
        expect("" if system is None else system, str, f"{place}: 'system'", good(format))
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    elif format == "alpaca":
        canonical = alpaca_document(value, place, good(format), as_chat=has_template)
    elif format == "preference":
        canonical = preference_pair(value, place, good(format), has_template=has_template)
        if value.get("margin") is not None:
            canonical["margin"] = value["margin"]  # `AnswerEncoder` checks it where it is read.
    elif format == "steps":
        canonical = labelled_steps(value, place, good(format))
    else:
        canonical = {key: _string(value, key, place, format) for key in REQUIRED_KEYS[format]}
    if is_judged:
        # In TRL's conversational form, all turns behind the prompt are the answer.
        is_joined = format == "chat" and reading.columns.get("messages", "messages") not in record.value
        canonical = judged_answer(canonical, value, place, f"a good line: {JUDGED_EXAMPLE}", whole=is_joined)
    known = {*format_keys(format), *VERDICT_KEYS, *(PREFERENCE_KEYS if format == "preference" else ())}
    return Document(place, record.num_bytes, canonical, _unread(value, known))


def _unread(value: dict[str, Any], known: Set[str]) -> Set[str]:
    """Return the keys of a record with a value that are not `known`, and "messages.KEY" for those of its messages."""
    in_messages = _message_keys([item for key, item in value.items() if key in known]) - MESSAGE_KEYS
    others = {key for key, item in value.items() if key not in known and item not in (None, "", [], {})}
    return others | {f"messages.{key}" for key in in_messages}


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


def _read(value: dict[str, Any], reading: Reading, *, is_prompt_only: bool = False) -> dict[str, Any]:
    """Return a record with the keys of the format in place of the data's, and without those that are not read."""
    columns = reading.columns
    if reading.ignore_columns or reading.reasoning_key:
        value = {key: _messages_read(item, reading) for key, item in value.items() if key not in reading.ignore_columns}
    if columns:
        taken = set(columns.values())
        rest = {key: item for key, item in value.items() if key not in taken}
        value = rest | {key: value[column] for key, column in columns.items() if column in value}
    prompt, completion = value.get("prompt"), value.get("completion")
    if (
        isinstance(prompt, list)
        and isinstance(completion, list | dict)
        and "messages" not in value
        and not is_prompt_only
    ):
        # TRL's conversational form of a prompt and its completion.
        prompt_turns = [
            turn | {"train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
            for turn in prompt
        ]
        rest = {key: item for key, item in value.items() if key not in ("prompt", "completion")}
        return rest | {"messages": prompt_turns + (completion if isinstance(completion, list) else [completion])}
    if "chosen" not in value:
        for names in PAIR_NAMES:
            if value.keys() >= {*names}:
                return value | {side: value[name] for side, name in zip(SIDES, names, strict=True)}
    return value


def _messages_read(item: Any, reading: Reading) -> Any:
    """Return messages without the keys that are not read, and their reasoning under reasoning_content."""
    if isinstance(item, list):
        return [_messages_read(message, reading) for message in item]
    if not isinstance(item, dict) or not {"content", "value"} & item.keys():
        return item
    kept = {key: part for key, part in item.items() if key not in reading.ignore_columns}
    if reading.reasoning_key in kept:
        kept["reasoning_content"] = kept.pop(reading.reasoning_key)
    return kept


def head_with_key(records: Iterator[Record], key: str) -> list[Record]:
    """Return the records up to the first of which a message has `key`. Raises UserError if 1,000 have none."""
    head, keys = list[Record](), set[str]()
    for record in itertools.islice(records, 1000):
        head.append(record)
        keys |= _message_keys(list(record.value.values()) if isinstance(record.value, dict) else None)
        if key in keys:
            return head
    place = head[0].place
    raise UserError(
        f"{place}: data.reasoning_key={key} is a key of no message in {len(head):,} records{nearest(key, keys)}; the "
        f"keys there are {listed(dict.fromkeys(sorted(keys)))}; correct it, or leave it out"
    )


def _message_keys(item: Any) -> set[str]:
    if isinstance(item, list):
        return set().union(*map(_message_keys, item))
    return set(item) if isinstance(item, dict) and {"content", "value"} & item.keys() else set()


def _string(value: dict[str, Any], key: str, place: str, format: str) -> str:
    item = value[key]
    if not isinstance(item, str):
        hint = ""
        if isinstance(item, list) and format == "prompt_completion":
            hint = ' (write a conversation as {"messages": [...]}, with "train": false in the turns of the prompt)'
        raise UserError(f"{place}: {key!r} is {kind_name(item)}, not a string{hint}; {good(format)}")
    return item
