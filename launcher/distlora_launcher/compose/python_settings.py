"""Turn settings given in Python into overrides, the arguments of `distlora train`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from distlora.config import UserError, require
from distlora.config.errors import short
from distlora_launcher.compose.compose import MAPPINGS, known_models

_UNQUOTED = re.compile(r"(?!(?i:null|true|false|inf|nan)$)[A-Za-z_./][\w./-]*")
"""A string that Hydra's grammar takes for itself."""
_SPECIAL = re.compile(r"([\\()\[\]{}:=, \t])")
"""Characters of a mapping's key that Hydra's grammar wants escaped."""


def as_overrides(
    *,
    model: str | Path | None = None,
    data: str | Path | None = None,
    recipe: str | None = None,
    gpu: str | None = None,
    run_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the arguments of `distlora train` for these settings; None is left out.

    model: a name for model=, a folder or a name on the hub. settings: dotted names, or nested mappings of them.
    """
    named = {"recipe": recipe, "gpu": gpu, "data.path": data, "run_dir": run_dir}
    if model is not None:
        named["model" if str(model) in known_models() else "model.path"] = model
    words = [_override(name, value) for name, value in named.items() if value is not None]
    given = {word.partition("=")[0]: word for word in words}
    for name, value in _leaves(settings or {}):
        require(name not in given, f"{name} is set twice, by an argument and in settings; leave one of them out")
        words.append(_override(name, value))
    return words


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value); the mappings of MAPPINGS are values."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in MAPPINGS:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _override(name: str, value: Any) -> str:
    return f"{name}={_value(name, value)}"


def _value(name: str, value: Any) -> str:
    """Return a value in Hydra's grammar. Raises UserError for an object that is not a setting's value."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        text = str(Path(value).expanduser()) if isinstance(value, Path) or value.startswith("~/") else value
        return text if _UNQUOTED.fullmatch(text) else QuotedString(text, Quote.single).with_quotes()
    if isinstance(value, Mapping):
        items = (_SPECIAL.sub(r"\\\1", str(key)) + ":" + _value(name, item) for key, item in value.items())
        return f"{{{','.join(items)}}}"
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return f"[{','.join(_value(name, item) for item in value)}]"
    raise UserError(
        f"{name}={short(value)} is of type {type(value).__name__}; give a text, a number, True, False, None, a list or "
        "a mapping"
    )
