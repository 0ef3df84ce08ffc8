"""Text that JSON's escapes can break, and JSON inside of strings: what every reader of records needs."""

from __future__ import annotations

import json
from typing import Any

from distlora.config import UserError


def check_unicode(value: Any, place: str) -> None:
    """Refuse half a surrogate pair, on which tokenizers raise. Only JSON's escapes can bring one in."""
    waiting = [value]
    while waiting:  # No recursion: json nests deeper than Python's calls may.
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{place}: half a surrogate pair (\\u{ord(item[error.start]):04x}) is no character; "
                    "write the pair, or the character itself in UTF-8"
                ) from error


def parse_string(text: str, place: str, what: str, advice: str) -> Any:
    """JSON that a record holds in a string, as OpenAI's API writes arguments. `what` is the string's role in a message.

    Raises UserError for what is not JSON, which ends with `advice`, and for half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {what} is not JSON ({error}); {advice}") from error
    if "\\ud" in text or "\\uD" in text:
        check_unicode(value, place)
    return value
