"""Rewards that verify an answer: 1.0 if it is right, 0.0 if not, None if the record says null for its column.

Each is called with a completion's text and the value of its column (`distlora.config.documents.BUILT_IN`). A fault of
the record (an invalid pattern, an answer that is no mathematics) raises; one of the completion is 0.0.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import signal
from collections.abc import Callable
from typing import Any

from distlora.config import DataConfig
from distlora.config.documents import BUILT_IN
from distlora.rewards import sandbox

PACKAGES = {"math": "math_verify", "json_schema": "jsonschema"}
"""Packages of the extra `rl` that built-in rewards need."""
_MOST_DIGITS = 100_000
"""Digits of powers and factorials that math computes. It reads numbers of 4,300 digits, as Python does."""
_BLOCK = re.compile(r"^[ \t]*(`{3,}+|~{3,}+)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
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
        "math": lambda completion, answer: _equal_mathematics(completion, answer, data.reward_timeout),
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


class _TooSlowError(BaseException):
    """Raised where a comparison's time has passed; sympy catches every Exception."""


def _stop(*_: Any) -> None:
    raise _TooSlowError


def _equal_mathematics(completion: str, answer: Any, seconds: float) -> bool:
    """Return whether math-verify finds both equal within `seconds`. A number too large to compute is not equal."""
    import math_verify

    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    expected = math_verify.parse(str(answer), parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify finds no mathematics in the answer {str(answer)[:100]!r}")
    if re.search(r"\d{4301}", completion):
        return False
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # Of CPU time, and again: some code catches every exception.
    try:
        parsed = math_verify.parse(completion, parsing_timeout=None)
        if any(map(_is_huge, parsed)):
            return bool(parsed[0] == expected[0])  # As written, not computed.
        return bool(math_verify.verify(expected, parsed, timeout_seconds=None))
    except (_TooSlowError, ArithmeticError, ValueError, RuntimeError):  # sympy raises the others, as for (-1)!.
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _is_huge(expression: Any) -> bool:
    """Return whether a power or factorial in an expression of sympy has more than _MOST_DIGITS, or its inverse has."""
    from sympy import Float, Pow, binomial, exp, factorial, postorder_traversal

    largest = Float(10) ** _MOST_DIGITS
    for node in postorder_traversal(expression):  # Inner ones first: a tower of powers ends at the second.
        if isinstance(node, (Pow, exp, factorial, binomial)) and node.is_number:
            value = abs(node.evalf(2))
            if value.is_Float and (value > largest or 0 < value < 1 / largest):
                return True
    return False


def _fits_schema(completion: str, schema: Any) -> bool:
    from jsonschema.validators import validator_for
    from referencing.jsonschema import EMPTY_REGISTRY

    schema = json.loads(schema) if isinstance(schema, str) else schema
    kind = validator_for(schema)
    kind.check_schema(schema)
    validator = kind(schema, registry=EMPTY_REGISTRY)  # Without one it reads references by network.
    validator.is_valid(None)  # A reference without end is a fault of the record.
    block = last_block(completion)
    try:
        value = json.loads(completion if block is None else block, parse_constant=_no_json)
        return bool(validator.is_valid(value))
    except (ValueError, RecursionError, OverflowError):  # No JSON, too deep, or a number beyond float64.
        return False


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
