"""The first stage: lines of a jsonl file to documents, every broken line refused by file and line.

Imports neither torch nor transformers: the launcher checks the head of a data file before anything starts.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import DATA_FORMATS, UserError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")

EXAMPLES = {
    "chat": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    "prompt_completion": '{"prompt": "The capital of France is", "completion": " Paris."}',
    "text": '{"text": "Once upon a time ..."}',
}
"""A good line of each format, shown with every complaint about a bad one."""

_KEYS = {"chat": ("messages",), "prompt_completion": ("prompt", "completion"), "text": ("text",)}


@dataclass(frozen=True, slots=True)
class Document:
    """One line. `value` holds the strings under "text" or "prompt" and "completion", or the dicts under "messages"."""

    line: int
    """Counted from 1, blank lines included: what an editor shows."""
    num_bytes: int
    """Length of the line in the file, for progress."""
    value: dict[str, Any]


def resolve_format(path: str | Path, format: str = "auto") -> str:
    """`format`, or with `auto` the one format whose keys the first document has. Reads one line.

    Raises UserError for a file that is absent or empty, and for a first line that fits no format or several.
    """
    for line, raw in _lines(path):
        if format != "auto":
            return format
        value = _parse(raw, f"{path}:{line}", "auto")
        fitting = [name for name, keys in _KEYS.items() if all(key in value for key in keys)]
        if len(fitting) == 1:
            return fitting[0]
        found = f"the line has {_listed(value)}"
        if fitting:
            raise UserError(
                f"{path}:{line}: {found}, which fits the formats {' and '.join(fitting)}; "
                f"choose one with data.format={fitting[0]}"
            )
        raise UserError(f"{path}:{line}: {found}, which fits no format; {_good('auto')}")
    raise UserError(f"{path} holds no document (an empty file or blank lines only); {_good(format)}")


def read_documents(path: str | Path, format: str) -> Iterator[Document]:
    """Every document of a file in order, one line in memory at a time; blank lines are skipped.

    `format` is a resolved one (never `auto`). Raises UserError at the first broken line.
    """
    assert format in _KEYS, f"{format!r} is not resolved"
    check = {"chat": _check_chat, "prompt_completion": _check_strings, "text": _check_strings}[format]
    for line, raw in _lines(path):
        place = f"{path}:{line}"
        value = _parse(raw, place, format)
        for key in _KEYS[format]:
            if key not in value:
                raise UserError(f"{place}: no {key!r} among its keys: {_listed(value)}; {_good(format)}")
        check(value, place, format)
        if b"\\ud" in raw.lower():  # The only way in for half a surrogate pair, on which tokenizers raise.
            _check_unicode(value, place, format)
        yield Document(line, len(raw), value)


def check_head(path: str | Path, format: str = "auto", limit: int = 1000) -> str:
    """Check the first `limit` documents of a file; return the resolved format. Raises UserError at a broken line."""
    resolved = resolve_format(path, format)
    for count, _ in enumerate(read_documents(path, resolved), start=1):
        if count == limit:
            break
    return resolved


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of the lines that are not blank. Splits at newlines alone, as JSON lines do."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; set data.path (or data.eval_path) to a jsonl file")
    if not path.is_file():
        raise UserError(f"{path} is not a file; set data.path (or data.eval_path) to one jsonl file")
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            content = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if content.strip():
                yield line, content


def _parse(raw: bytes, place: str, format: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; convert the file to UTF-8"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON, column {error.colno}: {error.msg} ({_shown(text)}); {_good(format)}"
        ) from error
    except (ValueError, RecursionError) as error:  # An integer of thousands of digits; brackets nested without end.
        raise UserError(f"{place}: JSON that cannot be read: {error} ({_shown(text)}); {_good(format)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: {_kind(value)} where an object belongs ({_shown(text)}); {_good(format)}")
    return value


def _check_strings(value: dict[str, Any], place: str, format: str) -> None:
    for key in _KEYS[format]:
        if not isinstance(value[key], str):
            raise UserError(f"{place}: {key!r} is {_kind(value[key])}, not a string; {_good(format)}")


def _check_chat(value: dict[str, Any], place: str, format: str) -> None:
    messages = value["messages"]
    if not isinstance(messages, list):
        raise UserError(f"{place}: 'messages' is {_kind(messages)}, not a list; {_good(format)}")
    if not messages:
        raise UserError(f"{place}: 'messages' is empty; remove the line. {_good(format)}")
    if value.get("tools"):
        raise UserError(f"{place}: 'tools' are not supported; remove the key, or describe them in a system message")
    for index, message in enumerate(messages):
        where = f"{place}: messages[{index}]"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {_kind(message)}, not an object; {_good(format)}")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"{where} has no {key!r} among its keys: {_listed(message)}; {_good(format)}")
            if not isinstance(message[key], str):
                raise UserError(f"{where}: {key!r} is {_kind(message[key])}, not a string; {_good(format)}")
        role = message["role"]
        if role not in ROLES:
            raise UserError(
                f"{where} has the role {role!r}{nearest(role, ROLES)}; use one of {', '.join(ROLES)}. {_good(format)}"
            )


def _check_unicode(value: dict[str, Any], place: str, format: str) -> None:
    messages = value["messages"] if format == "chat" else [value]
    for text in (item for message in messages for item in message.values() if isinstance(item, str)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: half a surrogate pair (\\u{ord(text[error.start]):04x}) is no character; "
                "write the pair, or the character itself in UTF-8"
            ) from error


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def _listed(value: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in list(value)[:8]) or "none"


def _shown(text: str) -> str:
    """The start of a line, short enough for a message; ASCII, since a terminal may not show the rest."""
    text = text.strip()
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _good(format: str) -> str:
    if format in EXAMPLES:
        return f"a good line: {EXAMPLES[format]}"
    assert format in DATA_FORMATS
    return "good lines: " + " or ".join(EXAMPLES.values())
