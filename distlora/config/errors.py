"""The error for bad input, the nearest valid word, and checks that sections share."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import re
import reprlib
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field
from typing import Any

_START, _END = 1500, 500
"""Characters of a message's line that are shown where a value out of a file made it longer: what to do stands last."""


_SETTING = re.compile(r"\{([a-z]+\.\w+)\}(=?)")
"""A setting that a message names by a placeholder, and the `=` behind it."""


class UserError(ValueError):
    """Report bad input: the value, the reason and what to type instead. Ends a command with exit code 2.

    A message may have `{section.name}` for the name of a setting. `named` replaces it by the argument that the user of
    a command typed (`--text` for data.path).

    Values from damaged files are shown printable and short.
    """

    def __init__(self, *lines: str) -> None:
        self._lines = lines
        super().__init__(*(in_one_line(_with_names(line, {})) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)

    def named(self, names: Mapping[str, str]) -> UserError:
        """Return the error in the words of a command: `names` has the argument for each setting."""
        return UserError(*(_with_names(line, names) for line in self._lines))


def _with_names(line: str, names: Mapping[str, str]) -> str:
    """Replace placeholders: `{data.path}=x` becomes `--text x` where `names` has it, else `data.path=x`."""

    def name(match: re.Match[str]) -> str:
        return f"{names[match[1]]}{match[2] and ' '}" if match[1] in names else f"{match[1]}{match[2]}"

    return _SETTING.sub(name, line)


@contextlib.contextmanager
def named_settings(names: Mapping[str, str]) -> Iterator[None]:
    """Raise UserErrors of the block with the command's arguments in place of settings (`UserError.named`)."""
    try:
        yield
    except UserError as error:
        raise error.named(names) from error


def in_one_line(text: str) -> str:
    """Return a text printable, in one line and without its middle where it is very long."""
    if len(text) > _START + _END:
        text = f"{text[:_START]} ... {text[-_END:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Short(reprlib.Repr):
    """Write true, false and null as YAML and JSON do."""

    def repr_bool(self, value: bool, level: int) -> str:
        return as_typed(value)

    def repr_NoneType(self, value: None, level: int) -> str:
        return as_typed(value)


_SHORT = _Short()
_SHORT.maxlevel = 4
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


def short(value: object) -> str:
    """Return a value from a file as a message shows it: YAML's references can make it endless."""
    return _SHORT.repr(value)


def as_typed(value: object) -> str:
    """Return a setting's value as a user types it: true, false, null, [a,b]."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{','.join(map(as_typed, value))}]" if isinstance(value, (list, tuple)) else str(value)


FILES = 0.75
"""`cutoff` for names of files, which share their endings without being alike."""
_LONGEST_WORD = 200
"""Characters of a word that somebody may have mistyped; comparing takes their square."""


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ` (did you mean 'x'?)` for the closest choice by difflib's ratio, from `cutoff`; else an empty string."""
    if len(word) > _LONGEST_WORD:
        return ""
    close = difflib.get_close_matches(word, [choice for choice in choices if len(choice) <= _LONGEST_WORD], 1, cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


Refusals = Iterator[str]
"""Sentences of a section's checks, each for what it refuses.

`name= ...` at the beginning becomes `section.name=VALUE ...`, and `{field}` the setting's name (`refusal`).
"""


def positive(section: Any, names: str) -> Refusals:
    """Refuse fields that are neither None nor a finite number above 0."""
    for name in names.split():
        value = getattr(section, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{name}= must be positive; set {{field}} to a number above 0"


def share(section: Any, names: str) -> Refusals:
    """Refuse fields that are neither None nor a number from 0 to 1."""
    for name in names.split():
        value = getattr(section, name)
        if value is not None and not 0 <= value <= 1:
            yield f"{name}= is not a fraction; set {{field}} from 0 to 1"


def at_least_zero(section: Any, **sentences: str) -> Refusals:
    """Refuse fields that are neither None nor 0 or more and finite."""
    for name, sentence in sentences.items():
        value = getattr(section, name)
        if value is not None and not 0 <= value < math.inf:
            yield f"{name}= {sentence}"


def both(section: Any, first: str, second: str, what: str) -> Refusals:
    """Refuse two fields that set `what` if both have a value; a recipe may have set one of them."""
    other = getattr(section, second)
    if getattr(section, first) is not None and other not in (None, "auto"):
        yield (
            f"{first}= and {{section}}.{second}={other} both set {what}; leave one of them out, or where a recipe sets "
            f"it, set it to null ({{section}}.{second}=null)"
        )


def default_of(item: Field[Any]) -> Any:
    """Return the default of a dataclass's field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def twice(items: Iterable[Any]) -> Any:
    """Return the first item that occurs more than once; None if there is none."""
    return next((item for item, count in Counter(items).items() if count > 1), None)


def count_from(value: Any, *, least: int) -> bool:
    """Return whether a value is a whole number from `least` on."""
    return isinstance(value, int) and value >= least


def refusal(name: str, section: Any, sentence: str) -> UserError:
    """Return the error of a check of the section `name`. The setting is a placeholder in it (see UserError)."""
    start = re.match(r"(\w+)= ", sentence)
    text = sentence.replace("{section}", name)
    if start is None:
        return UserError(text)
    value, setting = getattr(section, start[1]), f"{{{name}.{start[1]}}}"
    return UserError(f"{setting}={as_typed(value)} {text[start.end() :].replace('{field}', setting)}")


def require_choice(setting: str, value: object, choices: Iterable[str]) -> None:
    """Raise UserError with the nearest word unless the value is one of the choices."""
    words = list(choices)
    if value not in words:  # The nearest takes longer to find than all else that a section checks.
        hint = nearest(value, words) if isinstance(value, str) else ""
        raise UserError(f"{setting}={short(value)} is not one of {', '.join(words)}{hint}")


def require_choices(section: str, config: Any) -> None:
    """Raise UserError unless each field whose type is a Literal has one of its values."""
    for name, choices in _choices_of(config.__class__).items():
        require_choice(f"{section}.{name}", getattr(config, name), choices)


@functools.cache
def _choices_of(section: type) -> dict[str, tuple[str, ...]]:
    hints = typing.get_type_hints(section)
    return {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
