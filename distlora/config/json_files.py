"""Read JSON files that may be damaged as the object that they should hold. Needs no torch."""

import json
import sys
from pathlib import Path
from typing import Any

from distlora.config.errors import UserError, short

Shape = Any
"""Shape of a JSON value.

It is a type (`float`: any finite number), a list of one shape, a dict of shapes by key, or a tuple of alternatives. A
key that ends in "?" may be absent. "*" matches every other key; without it other keys are ignored.
"""

_LARGEST = sys.float_info.max
_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def read_object(path: Path, remedy: str, shape: Shape = dict) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError, ending with `remedy`, if it holds none of this shape."""
    if not path.is_file():  # Reading a pipe would wait for a writer.
        raise UserError(f"{path} is missing or not a file; {remedy}")
    value = parse_object(path.read_bytes(), path, remedy)
    check_shape(value, shape, path, remedy)
    return value


def object_or_empty(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none or it cannot be read."""
    try:
        return read_object(path, "")
    except (UserError, OSError):
        return {}


def parse_object(content: bytes, place: Path | str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in bytes read at `place`. Raises UserError if they hold none."""
    try:
        value = json.loads(content, object_hook=_with_infinity)
    except (ValueError, RecursionError) as error:
        # Invalid JSON or UTF-8, an integer with thousands of digits, or endlessly nested brackets.
        raise UserError(f"{place} is damaged: it is not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{place} is damaged: it is not a JSON object; {remedy}")
    return value


def _with_infinity(value: dict[str, Any]) -> Any:
    """Return the number that transformers writes as an object, as JSON has no infinity; any other object as it is."""
    return float(str(value["__float__"])) if value.keys() == {"__float__"} else value


def check_shape(value: Any, shape: Shape, place: Path | str, remedy: str, *, name: str = "") -> None:
    """Raise UserError if a value read at `place` does not have the shape."""
    options = shape if isinstance(shape, tuple) else (shape,)
    if any(isinstance(option, type) and _is_of(value, option) for option in options):
        return
    inner = next((option for option in options if isinstance(option, type(value)) and option is not None), None)
    if isinstance(inner, dict):
        _check_keys(value, inner, place, remedy, name)
    elif isinstance(inner, list):
        for number, item in enumerate(value):
            check_shape(item, inner[0], place, remedy, name=f"{name}[{number}]")
    else:
        wanted = " or ".join(_WORDS[option if isinstance(option, type) else type(option)] for option in options)
        raise UserError(f"{place} is damaged: {name or 'its content'} is {short(value)}, not {wanted}; {remedy}")


def _check_keys(value: dict[str, Any], shape: dict[str, Shape], place: Path | str, remedy: str, name: str) -> None:
    known = {key.removesuffix("?"): key for key in shape if key != "*"}
    for key in dict.fromkeys([*value, *known]):
        path = f"{name}.{key}" if name else key
        if key not in value:
            if not known[key].endswith("?"):
                raise UserError(f"{place} is damaged: it has no {path}; {remedy}")
        elif (inner := shape.get(known.get(key, "*"))) is not None:
            check_shape(value[key], inner, place, remedy, name=path)


def _is_of(value: Any, kind: type) -> bool:
    """Return whether a value is of a type: integers are numbers; true, false, NaN and Inf are not."""
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and -_LARGEST <= value <= _LARGEST
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
