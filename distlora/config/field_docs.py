"""Read the docstrings under a dataclass's fields, and describe every setting of a run: its values, default, meaning.

`distlora train --help`, `distlora init` and the settings reference in docs/ are made from this.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from distlora.config import Config, SweepConfig
from distlora.config.serve import ServeConfig

_SENTENCE = re.compile(r".*?[^.]\.(?= [A-Z`0-9]|$)")
"""Matches the first sentence of a docstring in one line; `null: ...` after a full stop belongs to it."""
_WORDS = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}


def field_docs(section: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases, in one line; fields may have none."""
    texts: dict[str, str] = {}
    for owner in section.__mro__[-2::-1]:
        (definition,) = ast.parse(inspect.getsource(owner)).body
        assert isinstance(definition, ast.ClassDef)
        for item, after in itertools.pairwise(definition.body):
            if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
                texts[ast.unparse(item.target)] = " ".join(ast.literal_eval(after.value).split())
    return texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting of a run, as a help text or a reference shows it."""

    name: str
    """Dotted name, as typed: `optim.lr`."""
    values: str
    """Its values: the choices separated by `|`, or words for its type, with `or null`."""
    choices: tuple[str, ...]
    """Choices of a setting that takes one of a few words; else empty."""
    default: str
    """Default as typed on the command line; empty for a required setting."""
    doc: str
    """Whole docstring in one line; empty for a field without one."""

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        match = _SENTENCE.match(self.doc)
        return match[0] if match else self.doc


def settings_of(section: type, prefix: str = "", defaults: object = None) -> list[Setting]:
    """Return the settings of a config dataclass in its order, without its nested sections.

    `defaults`: an instance whose values are the defaults, if they differ from those of the class.
    """
    hints, docs = typing.get_type_hints(section), field_docs(section)
    return [
        Setting(
            name=prefix + item.name,
            values=_values(hints[item.name]),
            choices=_choices(hints[item.name]),
            default=_default(item) if defaults is None else _typed(getattr(defaults, item.name)),
            doc=docs.get(item.name, ""),
        )
        for item in dataclasses.fields(section)
        if not dataclasses.is_dataclass(hints[item.name])
    ]


def sections() -> Iterator[tuple[str, str, list[Setting]]]:
    """Yield (name, summary, settings) of each section of a run; first those without a section, under an empty name."""
    yield "", "The run", settings_of(Config)
    factories = {item.name: item.default_factory for item in dataclasses.fields(Config)}
    for name, section in {**typing.get_type_hints(Config), "serve": ServeConfig, "sweep": SweepConfig}.items():
        if dataclasses.is_dataclass(section):
            summary = " ".join(str(inspect.getdoc(section)).partition("\n\n")[0].split())
            factory = factories.get(name, MISSING)
            defaults = None if factory is MISSING else factory()
            yield name, summary, settings_of(section, f"{name}.", defaults)  # type: ignore[arg-type]


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> tuple[str, ...]:
    return next((tuple(map(str, get_args(kind))) for kind in _members(hint) if get_origin(kind) is Literal), ())


def _values(hint: Any) -> str:
    words = []
    for kind in _members(hint):
        origin = get_origin(kind)
        if kind is type(None):
            words.append("null")
        elif origin is Literal:
            words.append(" | ".join(map(str, get_args(kind))))
        elif origin is tuple:
            words.append("list")
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            words.append("mapping")
        else:
            words.append(_WORDS.get(kind.__name__, kind.__name__))
    return " or ".join(dict.fromkeys(words))


def _default(item: dataclasses.Field[Any]) -> str:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return "" if default is MISSING else _typed(default)


def _typed(default: Any) -> str:
    """Return a default as typed on the command line."""
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    if isinstance(default, (tuple, list)):
        return f"[{','.join(map(str, default))}]"
    return re.sub(r"e-0?", "e-", f"{default:g}") if isinstance(default, float) else str(default)
