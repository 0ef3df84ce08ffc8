"""Rewards that verify an answer: 1.0 if it is right, 0.0 if not, None if the record says null for its column.

Each is called with a completion's text and the value of its column (`distlora.config.rewards.BUILT_IN`). A fault of the
record (an invalid pattern, an answer that is no mathematics) raises; one of the completion is 0.0.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable
from typing import Any

from distlora.config import DataConfig
from distlora.config.rewards import BUILT_IN
from distlora.rewards import sandbox

PACKAGES = {"math": "math_verify", "json_schema": "jsonschema"}
"""Packages of the extra `rl` that built-in rewards need."""
_BLOCK = re.compile(r"^[ \t]*(```+|~~~+)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
"""A fenced block of Markdown, and what is in it."""


def reward_function(name: str, data: DataConfig) -> Callable[..., list[float | None]]:
    """Return a built-in reward with TRL's signature: keyword arguments with a list each, and a list of rewards."""
    if name in PACKAGES:
        importlib.import_module(PACKAGES[name])  # Here, where no answer's time runs.
    column = BUILT_IN[name]
    key = data.reward_columns.get(column, column)

    def reward(*, completions: list[Any], **columns: list[Any]) -> list[float | None]:
        if key not in columns:
            raise KeyError(
                f"the record has no column {key!r}; name another one by data.reward_columns={{{column}: ...}}, or "
                "write null there in records that this reward is not for"
            )
        pairs = zip(completions, columns[key], strict=True)
        return [None if value is None else float(verify(text_of(text), value)) for text, value in pairs]

    def unit_tests(completion: str, tests: Any) -> bool:
        text = tests if isinstance(tests, str) else "\n".join(tests)
        code = last_block(completion)
        isolation, seconds = data.rewards_isolation, data.reward_timeout
        return code is not None and sandbox.passes(code, text, isolation=isolation, seconds=seconds)

    verifiers: dict[str, Callable[[str, Any], bool]] = {
        "exact_match": lambda completion, answer: completion.strip() == str(answer).strip(),
        "regex": lambda completion, pattern: re.search(pattern, completion) is not None,
        "math": _equal_mathematics,
        "json_schema": _fits_schema,
        "unit_tests": unit_tests,
    }
    verify = verifiers[name]
    return reward


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """Return the text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def last_block(text: str) -> str | None:
    """Return the content of the last fenced block of a text; None if it has none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1][1] if blocks else None


def _equal_mathematics(completion: str, answer: Any) -> bool:
    import math_verify

    # Its own limits would make a slow comparison a wrong answer; here it is counted as a timeout.
    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    expected = math_verify.parse(str(answer), parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify finds no mathematics in the answer {str(answer)[:100]!r}")
    found = math_verify.parse(completion, parsing_timeout=None)
    return bool(math_verify.verify(expected, found, timeout_seconds=None))


def _fits_schema(completion: str, schema: Any) -> bool:
    from jsonschema.validators import validator_for
    from referencing.jsonschema import EMPTY_REGISTRY

    schema = json.loads(schema) if isinstance(schema, str) else schema
    kind = validator_for(schema)
    kind.check_schema(schema)
    block = last_block(completion)
    try:
        value = json.loads(completion if block is None else block, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return False
    return bool(kind(schema, registry=EMPTY_REGISTRY).is_valid(value))  # Without one it reads references by network.


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
