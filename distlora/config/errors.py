"""How settings are refused: the error, the nearest valid word, and the checks that sections share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: the message holds the value, the reason and what to type instead. Ends a command with exit code 2."""


FILES = 0.75
"""`cutoff` for names of files, which share their endings without being alike."""


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.5) -> str:
    """` (did you mean 'x'?)` for the choice closest to a mistyped word, or an empty string when none is close.

    `cutoff` is the least difflib ratio, from 0 to 1, that counts as close.
    """
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_positive(section: str, config: Any, *names: str) -> None:
    """Each of the fields is None or a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or 0 < value < math.inf,
            f"{section}.{name}={value} must be positive; set {section}.{name} to a number above 0",
        )


def require_share(section: str, config: Any, *names: str) -> None:
    """Each of the fields is a number from 0 to 1."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{section}.{name}={value} is not a share; set {section}.{name} from 0 to 1")


def require_choice(setting: str, value: object, choices: Iterable[str]) -> None:
    """The value is one of the words."""
    words = list(choices)
    require(value in words, f"{setting}={value!r} is not one of {', '.join(words)}{nearest(str(value), words)}")
