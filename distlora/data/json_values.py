"""Values of records in JSON's words, for checks and their messages. Imports neither torch nor numpy."""

import json
from typing import Any

from distlora.config import UserError


def check_unicode(value: Any, place: str) -> None:
    """Refuse half a surrogate pair, on which tokenizers raise. Only JSON's escapes can bring one in."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: half a surrogate pair (\\u{ord(error.object[error.start]):04x}) is not a character; "
            "write the pair, or the character itself in UTF-8"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: its brackets are nested too deeply to be read; leave it out") from error


def parse_string(text: str, place: str, what: str, advice: str) -> Any:
    """Parse JSON in a string, as OpenAI's API writes arguments. `what` is the string's role in a message.

    Raises UserError for what is not JSON, which ends with `advice`, and for half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {what} is not JSON ({error}); {advice}") from error
    if "\\ud" in text or "\\uD" in text:
        check_unicode(value, place)
    return value


def kind_name(value: Any) -> str:
    """Return the kind of a JSON value in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def expect(value: Any, kind: type, what: str, good: str) -> Any:
    """Return a JSON value of a kind: dict, list or str. Raises UserError for another, of which `what` is the name."""
    if not isinstance(value, kind):
        raise UserError(f"{what} is {kind_name(value)}, not {kind_name(kind())}; {good}")
    return value


def listed(value: dict[str, Any]) -> str:
    """Return the keys of an object, as a message lists them."""
    return ", ".join(ascii(key) for key in list(value)[:12]) or "none"


def shown(text: str) -> str:
    """Return the start of a text, short enough for a message; ASCII, since a terminal may not show the rest."""
    text = text.strip()
    return ascii(text if len(text) <= 60 else text[:57] + "...")
