"""Records of a source to documents: chats, prompts with their completion, and texts (answers.py has the others).

A *record* is what a file or a data set holds (a line, a row); a *document* is what the tokenizer is given. A record
that is not what its format says is refused by its place. Imports neither torch nor transformers nor numpy: the launcher
checks the head of the data before anything starts.

A chat is {"messages": [...]} and, where there are any, "tools". A message has "role" (one of ROLES) and "content": a
string, a list of parts where images are among them (image_records.py), or None where "tool_calls" are there. It may
have "tool_calls" ([{"type": "function", "function": {"name": str, "arguments": dict}}]), "tool_call_id", "name",
"reasoning_content" or "thinking" (strings), one of MASK_KEYS ("train": bool; others: 0 or 1), and whatever else a
template reads. A key whose value is null is as good as absent: Arrow writes those.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from distlora.config import UserError, nearest
from distlora.data.image_records import COLUMNS, PART_TYPES, image_part, joined_parts, refuse_images, with_images
from distlora.data.json_values import expect, kind_name, listed, parse_string


class DataFormat(NamedTuple):
    """Keys of a record. Any other key is ignored and counted, but a prompt_only record keeps it for rewards."""

    example: str
    """A good record, shown with every complaint about a bad one."""
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Keys that a record may have besides; "label" only where answers are judged."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that are read, those that are needed first."""
        return self.required + self.optional


FORMATS = {
    "chat": DataFormat(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
        ("messages",),
        ("system", "tools", "label"),
    ),
    "sharegpt": DataFormat(
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
        ("conversations",),
        ("system", "tools", "label"),
    ),
    "alpaca": DataFormat(
        '{"instruction": "Translate to French.", "input": "cat", "output": "chat"}',
        ("instruction", "output"),
        ("input", "system", "history", "label"),
    ),
    "prompt_completion": DataFormat(
        '{"prompt": "The capital of France is", "completion": " Paris."}', ("prompt", "completion"), ("label",)
    ),
    "text": DataFormat('{"text": "Once upon a time ..."}', ("text",)),
    "preference": DataFormat(
        '{"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome."}',
        ("chosen", "rejected"),
        ("prompt", "system", "tools", "margin"),
    ),
    "prompt_only": DataFormat(
        '{"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5"}', ("prompt",), ("system", "tools")
    ),
    "steps": DataFormat(
        '{"prompt": "What is 2 + 3 + 4?", "completions": ["2 + 3 = 5.", "5 + 4 = 8."], "labels": [true, false]}',
        ("prompt", "completions", "labels"),
    ),
}
"""Values of data.format but `auto`."""
GOOD_VERDICT = 'a good line: {"prompt": "The capital of France is", "completion": " Paris.", "label": true}'
"""A good record of an answer that is judged, which any format but text can hold."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
}
"""Roles by the word under "from" (LLaMA-Factory's and FastChat's words)."""
CONVERSATION_KEYS = {"sharegpt": "conversations", "chat": "messages"}
"""Keys of conversations, by format."""
SIDES = ("chosen", "rejected")
PAIR_NAMES = (("chosen_messages", "rejected_messages"), ("chosen_response", "rejected_response"))
"""Other names for the two answers (Axolotl, Argilla)."""
VERDICT_KEYS = ("label", "kto_tag")
"""Keys of a record that say whether its answer is good (TRL and Axolotl; LLaMA-Factory)."""

_STRINGS = ("tool_call_id", "name", "reasoning_content", "thinking")
MASK_KEYS = ("train", "weight", "loss", "loss_weight", "loss_scale", "training")
"""Keys of a message that say whether it is trained (ours and Axolotl's, OpenAI's, ms-swift's, LLaMA-Factory's); no
template sees them."""
_MESSAGE_KEYS = frozenset(("role", "from", "content", "value", "tool_calls", *_STRINGS, *MASK_KEYS))
"""Keys of a message that are read, whatever the template reads besides."""
_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's parts that are text, in the words of OpenAI's APIs."""
_LIFTED = {"reasoning": "reasoning_content", "tool_call": "tool_calls"}
"""Key of a message that holds the parts of a type (LLaMA-Factory V1, whose parts are {"type", "value"})."""
_MASKS = frozenset(("mask", "loss_mask", "response_mask", "completion_mask", "assistant_masks", "train_detail"))
MEDIA_KEYS = frozenset(("image", "images", "video", "videos", "audio", "audios"))
NOT_TRAINED = {
    **dict.fromkeys(VERDICT_KEYS, "says whether its answer is good, which only train.objective=kto trains on"),
    **dict.fromkeys(("score", "scores", "reward", "rewards"), "rates it, which only reward models are trained on"),
    **dict.fromkeys(
        (*MASK_KEYS, *_MASKS, "sample_weight"), "masks or weights a loss, for which only messages have a key"
    ),
    **dict.fromkeys(COLUMNS, "holds images, which only vision models read, with data.images=true"),
    **dict.fromkeys(("video", "videos", "audio", "audios"), "holds media that no text model reads"),
    "chat_template_kwargs": "holds arguments of the chat template for this record alone",
}
"""Keys of a record that mean other training than of its text, and the reason."""
IMAGES_ADVICE = "set data.images=true for a model that takes images, or leave the record out"
"""End of a message about an image in a chat that is read as text."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of github.com/tatsu-lab/stanford_alpaca, with the newline at the end that LLaMA-Factory has."""
_GOOD_CALL = 'a good call: {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}'
_GOOD_PART = 'a good part: {"type": "tool_call", "value": "{\\"name\\": \\"weather\\", \\"arguments\\": {}}"}'
_GOOD_TOOL = 'a good one: {"type": "function", "function": {"name": "weather", "parameters": {...}}}'


class SourceRecord(NamedTuple):
    """A line, row or object as its source holds it."""

    place: str
    """Place in the source: "chats.jsonl:12", "chats.parquet row 12", "org/name train row 12"."""
    num_bytes: int
    """Bytes in the source, for progress; estimated for compressed and columnar files."""
    value: Any


@dataclass(frozen=True, slots=True)
class Document:
    """A document in canonical form, which the keys of `value` say.

    `value` is {"messages": [...]} with an optional "tools" (chat), {"prompt": str, "completion": str}, {"text": str},
    or one of the forms in answers.py. `unread`: keys of the record that nothing reads, and of its messages those that
    only a template may read, as "messages.KEY".
    """

    place: str
    num_bytes: int
    value: dict[str, Any]
    unread: Set[str] = frozenset()


class ReadOptions(NamedTuple):
    """Settings of these names, by which the records of a source are read."""

    columns: Mapping[str, str] = MappingProxyType({})
    ignore_columns: Sequence[str] = ()
    reasoning_key: str | None = None
    judged: bool = False
    """True if the objective learns from single answers that are judged."""
    images: bool = False
    image_root: Path | None = None
    """Folder of relative paths of images; None: the data lies on a server."""


AS_WRITTEN = ReadOptions()


def resolve_format(record: SourceRecord, format: str, reading: ReadOptions = AS_WRITTEN) -> str:
    """`format`, or with `auto` the one whose keys this record has, after `columns` renamed them.

    Only formats that know every key of `columns` come into question. Raises UserError for a column that the record
    lacks, a key that no format reads, and a record that fits no format or several.
    """
    columns = reading.columns
    candidates = [format] if format != "auto" else list(FORMATS)
    known = list(dict.fromkeys(key for name in candidates for key in FORMATS[name].keys))
    for key in columns:
        if key not in known:
            raise UserError(
                f"data.columns: {key!r} is not a key of data.format={format}{nearest(key, known)}; its keys are "
                f"{', '.join(known)} (write columns={{key: name in the data}})"
            )
    written = _object(record, format)
    for key, column in columns.items():
        if column not in written:
            raise UserError(
                f"{record.place}: data.columns names {column!r} as {key!r}, but the columns there are "
                f"{listed(written)}{nearest(column, written)}"
            )
    value = renamed(record, format, reading)
    if format == "prompt_completion" and isinstance(written.get(columns.get("prompt", "prompt")), list):
        return "chat" if "messages" in value else format  # `renamed` has joined the messages of both.
    if format != "auto":
        return format
    fitting = [
        name
        for name, keys in FORMATS.items()
        if all(value.get(key) is not None for key in keys.required) and set(columns) <= set(keys.keys)
    ]
    if fitting in (["chat", "preference"], ["sharegpt", "preference"]):
        conversation = value[CONVERSATION_KEYS[fitting[0]]]
        if is_prompt(conversation):  # The conversation of LLaMA-Factory's and Axolotl's pairs is their prompt.
            return "preference"
    fitting = [name for name in fitting if name != "prompt_only"] or fitting  # Every prompt may be one.
    if len(fitting) == 1:
        return fitting[0]
    described = f"it has {listed(value)}"
    if fitting:
        raise UserError(
            f"{record.place}: {described}, which fits the formats {' and '.join(fitting)}; "
            f"choose one with {' or '.join(f'data.format={name}' for name in fitting)}"
        )
    if "input_ids" in value:
        raise UserError(
            f"{record.place}: {described}: tokenized data is not supported; give the texts that it was made of"
        )
    raise UserError(
        f"{record.place}: {described}, which fits no format; name the columns of all keys of a format, as in "
        f"data.columns={{prompt: question, completion: answer}}. {good('auto')}"
    )


def to_document(record: SourceRecord, format: str, has_template: bool, reading: ReadOptions = AS_WRITTEN) -> Document:
    """Return a record in canonical form. Raises UserError, by place, for one that is not of this (resolved) format.

    Alpaca is a chat where there is a template to render one.
    """
    value = read_record(record, format, reading, NOT_TRAINED.keys())
    known = {*FORMATS[format].keys, *VERDICT_KEYS}
    return document_of(record, form_of(value, format, record.place, has_template=has_template), value, known, reading)


def document_of(
    record: SourceRecord, canonical: dict[str, Any], value: dict[str, Any], known: Set[str], reading: ReadOptions
) -> Document:
    """Return a document of a record that was read as `value`, of which it read the keys `known`."""
    if reading.images:
        canonical, known = with_images(canonical, value, record.place, reading.image_root), {*known, *COLUMNS}
    else:
        for side in (canonical, *(item for item in canonical.values() if isinstance(item, dict))):
            refuse_images(side.get("messages", ()), record.place, IMAGES_ADVICE)
    in_messages = keys_of_messages([item for key, item in value.items() if key in known]) - _MESSAGE_KEYS
    unread = {key for key, item in value.items() if key not in known and item not in (None, "", [], {})}
    return Document(record.place, record.num_bytes, canonical, unread | {f"messages.{key}" for key in in_messages})


def read_record(record: SourceRecord, format: str, reading: ReadOptions, refused: Set[str]) -> dict[str, Any]:
    """Return the record with all keys that its format needs, and no value under `refused` ones."""
    value, place = renamed(record, format, reading), record.place
    check_meaning(value, place, refused - {*COLUMNS} if reading.images else refused)
    if value.get("tools") and "tools" not in FORMATS[format].keys:
        raise UserError(
            f"{place}: 'tools' belongs to a chat, and data.format={format} has none; write the record as "
            '{"messages": [...], "tools": [...]}, or leave the key unread with data.ignore_columns=[tools]'
        )
    for key in FORMATS[format].required:
        if key not in value:
            other = next(
                (name for name, keys in FORMATS.items() if name != "prompt_only" and value.keys() >= {*keys.required}),
                None,
            )
            cure = f"; set data.format={other}, which reads them" if other else ""
            raise UserError(f"{place}: no {key!r} among its keys: {listed(value)}{cure}; {good(format)}")
    return value


def form_of(value: dict[str, Any], format: str, place: str, *, has_template: bool) -> dict[str, Any]:
    """Return the canonical form of a record with the keys of its format: a chat, prompt and completion, or a text."""
    if format in CONVERSATION_KEYS:
        if format == "sharegpt":
            value = value | sharegpt_messages(value, place, good(format))
        chat = check_chat(value, place, good(format))
        return chat | {"messages": opened(chat["messages"], value.get("system"), place, good(format))}
    if format == "alpaca":
        return alpaca_document(value, place, good(format), as_chat=has_template)
    return {key: _string(value, key, place, format) for key in FORMATS[format].required}


def check_chat(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return a canonical chat out of a record with "messages" and perhaps "tools".

    Raises UserError, which names the message by `place` and ends with the example `good`.
    """
    messages = _items(value, "messages", place, good)
    chat: dict[str, Any] = {
        "messages": [_message(message, f"{place}: messages[{index}]", good) for index, message in enumerate(messages)]
    }
    tools = _tools(value.get("tools"), place)
    return chat | {"tools": tools} if tools else chat


def sharegpt_messages(value: dict[str, Any], place: str, good: str) -> dict[str, Any]:
    """Return a ShareGPT record as {"messages", "tools"}, still to be checked.

    A turn is {"from", "value"}, or {"role", "content"} as in a chat.
    """
    messages = []
    for index, turn in enumerate(_items(value, "conversations", place, good)):
        where = f"{place}: conversations[{index}]"
        expect(turn, dict, where, good)
        messages.append(turn if "role" in turn and "from" not in turn else _sharegpt_turn(turn, where, good))
    return {"messages": messages, "tools": value.get("tools"), "system": value.get("system")}


def alpaca_document(value: dict[str, Any], place: str, good: str, *, as_chat: bool) -> dict[str, Any]:
    """Return an Alpaca record as a chat, or as a prompt and its completion in the words of Stanford Alpaca.

    In a chat the input follows the instruction on a new line, "history" holds earlier pairs of question and answer
    (trained as the last answer is), as in LLaMA-Factory. In the prompt, "system" replaces the opening sentence.
    """
    texts: dict[str, str] = {}
    for key in ("instruction", "output", "input", "system"):
        default = None if key in ("instruction", "output") else ""
        item = value.get(key)
        texts[key] = expect(default if item is None else item, str, f"{place}: {key!r}", good)
    history = expect(value.get("history") or [], list, f"{place}: 'history'", good)
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(f"{place}: history[{index}] is not a list of two strings, [question, answer]; {good}")
    if not as_chat:
        if history:
            raise UserError(
                f"{place}: 'history' is a conversation, and the tokenizer has no chat template to render one; "
                "set data.template=chatml, or remove the key"
            )
        prompt = ALPACA_WITH_INPUT if texts["input"] else ALPACA_WITHOUT_INPUT
        if texts["system"]:
            prompt = "{system}\n\n" + prompt[prompt.index("### Instruction") :]
        return {"prompt": prompt.format(**texts), "completion": texts["output"]}
    messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    question = texts["instruction"] + ("\n" + texts["input"] if texts["input"] else "")
    for user, assistant in [*history, (question, texts["output"])]:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages}


def _items(value: dict[str, Any], key: str, place: str, good: str) -> list[Any]:
    items: list[Any] = expect(value[key], list, f"{place}: {key!r}", good)
    if not items:
        raise UserError(f"{place}: {key!r} is empty; remove the line. {good}")
    return items


def _message(message: Any, where: str, good: str) -> dict[str, Any]:
    expect(message, dict, where, good)
    if "from" in message and "role" not in message:
        raise UserError(
            f"{where} has 'from' and no 'role': this is ShareGPT; set data.format=sharegpt "
            "data.columns={conversations: messages}"
        )
    if "role" not in message:
        raise UserError(f"{where} has no 'role' among its keys: {listed(message)}; {good}")
    role = expect(message["role"], str, f"{where}: 'role'", good)
    message = _lifted(message, where)
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!a}{nearest(role, ROLES)}; use one of {', '.join(ROLES)}. {good}")
    kept = {key: item for key, item in message.items() if item is not None}
    check_meaning(kept, where, MEDIA_KEYS | _MASKS)
    calls = kept.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise UserError(f"{where}: 'tool_calls' in a message of the role {role!a}; only the assistant calls tools")
        expect(calls, list, f"{where}: 'tool_calls'", _GOOD_CALL)
        kept["tool_calls"] = [_tool_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls)]
    kept["content"] = _content(message, where, good, required=not calls)
    for key in _STRINGS:
        expect(kept.get(key, ""), str, f"{where}: {key!r}", good)
    if "train" in kept and not isinstance(kept["train"], bool):
        raise UserError(f"{where}: 'train' is {kind_name(kept['train'])}; write true or false")
    for key in MASK_KEYS:
        if kept.get(key, 0) not in (0, 1):
            raise UserError(f"{where}: {key!r} is {kept[key]!r}; a turn is trained (1) or not (0)")
    return kept


def _lifted(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message with its parts of _LIFTED under the keys that templates read."""
    parts = message["content"] if isinstance(message.get("content"), list) else []
    moved = [part for part in parts if isinstance(part, dict) and part.get("type") in _LIFTED]
    values: dict[str, list[Any]] = {key: [] for key in _LIFTED.values()}
    for part in moved:
        key, what = _LIFTED[part["type"]], f"a part of the type {part['type']!r}"
        if message.get(key):
            raise UserError(f"{where}: {key!r} stands beside {what}; leave one of them out")
        value = expect(part.get("value"), str, f"{where}: {what}", _GOOD_PART)
        values[key].append(parse_string(value, where, f"{what} that", _GOOD_PART) if key == "tool_calls" else value)
    if not moved:
        return message
    content = [part for part in parts if part not in moved] or (None if values["tool_calls"] else "")
    lifted = {"tool_calls": values["tool_calls"], "reasoning_content": "".join(values["reasoning_content"])}
    return message | {"content": content} | {key: value for key, value in lifted.items() if value}


def _content(message: dict[str, Any], where: str, good: str, *, required: bool) -> str | list[dict[str, Any]] | None:
    """Return a message's text, joined from its parts; or those, with images. None only where tool calls stand in."""
    content = message.get("content")
    if content is None:
        if not required:
            return None
        if "content" not in message:
            raise UserError(f"{where} has no 'content' among its keys: {listed(message)}; {good}")
        raise UserError(f"{where}: 'content' is null, not a string, and there are no 'tool_calls'; {good}")
    if isinstance(content, list):
        return joined_parts([_part(part, where) for part in content])
    text: str = expect(content, str, f"{where}: 'content'", good)
    return text


def _part(part: Any, where: str) -> str | dict[str, Any]:
    """Return the text of a part of a message's content, or an image part in canonical form."""
    if isinstance(part, str):
        return part
    text = None
    if isinstance(part, dict):  # Arrow writes the other key as null.
        text = part.get("value") if part.get("text") is None else part["text"]
    if isinstance(text, str) and part.get("type", "text") in _TEXT_PARTS:
        return text
    if isinstance(part, dict) and part.get("type") in PART_TYPES:
        return image_part(part)
    described = f"of the type {part.get('type')!r}" if isinstance(part, dict) else kind_name(part)
    raise UserError(
        f"{where}: a part of 'content' is {described}; only texts and images can be read: "
        '{"type": "text", "text": "..."}, or a string'
    )


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object; OpenAI's API writes those as JSON in a string."""
    expect(call, dict, where, _GOOD_CALL)
    function = _function(call, where, _GOOD_CALL)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        what = "'arguments' is a string that"
        arguments = parse_string(arguments, where, what, _GOOD_CALL) if arguments.strip() else {}
    arguments = expect({} if arguments is None else arguments, dict, f"{where}: 'arguments'", _GOOD_CALL)
    canonical: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return canonical | ({"id": call["id"]} if call.get("id") is not None else {})


def _tools(tools: Any, place: str) -> list[dict[str, Any]]:
    """Return definitions of tools as {"type": "function", "function": {...}}; a string holds them as JSON."""
    if isinstance(tools, str):
        tools = parse_string(tools, place, "'tools' is a string that", _GOOD_TOOL) if tools.strip() else None
    items = expect([] if tools is None else tools, list, f"{place}: 'tools'", _GOOD_TOOL)
    functions = [_function(tool, f"{place}: tools[{index}]", _GOOD_TOOL) for index, tool in enumerate(items)]
    return [{"type": "function", "function": function} for function in functions]


def _function(item: Any, where: str, good: str) -> dict[str, Any]:
    """Return the function of a tool or of a call, which may be written without its wrapping."""
    function = (item.get("function") or item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} has no function with a 'name'; {good}")
    return function


def _sharegpt_turn(turn: dict[str, Any], where: str, good: str) -> dict[str, Any]:
    for key in ("from", "value"):
        if key not in turn:
            raise UserError(f"{where} has no {key!r} among its keys: {listed(turn)}; {good}")
    speaker, value = turn["from"], turn["value"]
    expect(value, list if isinstance(value, list) else str, f"{where}: 'value'", good)
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        words = ", ".join(SHAREGPT_ROLES)
        raise UserError(
            f"{where} is from {speaker!a}{nearest(str(speaker), SHAREGPT_ROLES)}; use one of {words}. {good}"
        )
    message: dict[str, Any] = {key: item for key, item in turn.items() if key not in ("from", "value")}
    message["role"] = SHAREGPT_ROLES[speaker]
    if speaker != "function_call" or not isinstance(value, str):
        return message | {"content": value}
    calls = parse_string(value, where, "a function_call that", 'write {"name": ..., "arguments": {...}}')
    return message | {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def opened(messages: list[Any], system: Any, place: str, good: str) -> list[Any]:
    """Return messages that begin with the record's "system", unless they have one of their own."""
    expect("" if system is None else system, str, f"{place}: 'system'", good)
    return (
        [{"role": "system", "content": system}, *messages] if system and messages[0]["role"] != "system" else messages
    )


def untrained(messages: Sequence[Any]) -> list[Any]:
    """Return messages of which no turn of the assistant is trained."""
    is_answer = [isinstance(message, dict) and message.get("role") == "assistant" for message in messages]
    return [
        message | {"train": False} if answer else message for message, answer in zip(messages, is_answer, strict=True)
    ]


def is_prompt(conversation: Any) -> bool:
    """Return whether a conversation waits for an answer: its last turn is not the assistant's."""
    if not isinstance(conversation, list) or not conversation or not isinstance(conversation[-1], dict):
        return isinstance(conversation, str) and conversation != ""
    role = conversation[-1].get("role", conversation[-1].get("from"))
    return not isinstance(role, str) or SHAREGPT_ROLES.get(role) != "assistant"


def check_meaning(value: dict[str, Any], place: str, names: Set[str]) -> None:
    """Raise UserError if one of `names`, which would change what a record means, has a value in it."""
    for key in names & value.keys():
        item = value[key]
        if isinstance(item, dict):  # Arrow writes an absent image as {"bytes": null, "path": null}.
            item = [part for part in item.values() if part is not None]
        if item is not None and item not in ("", []):
            missing = "" if key in (*VERDICT_KEYS, *COLUMNS) else "; that is not supported yet"
            raise UserError(
                f"{place}: {key!r} {NOT_TRAINED[key]}{missing}. To train on the text alone, every record alike, set "
                f"data.ignore_columns=[{key}]"
            )


def good(format: str) -> str:
    """Return a good record of a format, or the outline of every format, as the end of a message."""
    if format in FORMATS:
        return f"a good line: {FORMATS[format].example}"
    outlines = ["{" + ", ".join(f'"{key}": ...' for key in keys.required) + "}" for keys in FORMATS.values()]
    return f"good lines are {', '.join(outlines[:-1])} or {outlines[-1]}"


def _object(record: SourceRecord, format: str) -> dict[str, Any]:
    if not isinstance(record.value, dict):
        raise UserError(f"{record.place}: {kind_name(record.value)} where an object belongs; {good(format)}")
    return record.value


def renamed(record: SourceRecord, format: str, reading: ReadOptions, *, joins: bool = True) -> dict[str, Any]:
    """Return a record with the keys of the format in place of the data's, and without those that are not read.

    `joins`: messages of a prompt and of its completion become one conversation.
    """
    value, columns = _object(record, format), reading.columns
    if reading.ignore_columns or reading.reasoning_key:
        value = {key: _messages_read(item, reading) for key, item in value.items() if key not in reading.ignore_columns}
    if columns:
        taken = set(columns.values())
        rest = {key: item for key, item in value.items() if key not in taken}
        value = rest | {key: value[column] for key, column in columns.items() if column in value}
    prompt, completion = value.get("prompt"), value.get("completion")
    if joins and isinstance(prompt, list) and isinstance(completion, list | dict) and "messages" not in value:
        # TRL's conversational form of a prompt and its completion.
        rest = {key: item for key, item in value.items() if key not in ("prompt", "completion")}
        answer = completion if isinstance(completion, list) else [completion]
        return rest | {"messages": untrained(prompt) + answer}
    if "chosen" not in value:
        for names in PAIR_NAMES:
            if value.keys() >= {*names}:
                return value | {side: value[name] for side, name in zip(SIDES, names, strict=True)}
    return value


def _messages_read(item: Any, reading: ReadOptions) -> Any:
    """Return messages without the keys that are not read, and their reasoning under reasoning_content."""
    if isinstance(item, list):
        return [_messages_read(message, reading) for message in item]
    if not isinstance(item, dict) or not {"content", "value"} & item.keys():
        return item
    kept = {key: value for key, value in item.items() if key not in reading.ignore_columns}
    if reading.reasoning_key in kept:
        kept["reasoning_content"] = kept.pop(reading.reasoning_key)
    return kept


def keys_of_messages(item: Any) -> set[str]:
    """Return the keys of all messages in a value of a record."""
    if isinstance(item, list):
        return set().union(*map(keys_of_messages, item))
    return set(item) if isinstance(item, dict) and {"content", "value"} & item.keys() else set()


def _string(value: dict[str, Any], key: str, place: str, format: str) -> str:
    item = value[key]
    if not isinstance(item, str):
        hint = ""
        if isinstance(item, list) and format == "prompt_completion":
            hint = ' (write a conversation as {"messages": [...]}, with "train": false in the turns of the prompt)'
        raise UserError(f"{place}: {key!r} is {kind_name(item)}, not a string{hint}; {good(format)}")
    return item
