"""Choose the cells of a parametrized table for `make test`; the others run in `make test-ci` or `make test-all`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def ci(*values: Any, marks: Sequence[pytest.MarkDecorator] = ()) -> Any:
    """Return a case that only `make test-ci` runs, with further `marks`."""
    return pytest.param(*values, marks=[pytest.mark.ci, *marks])


def slow(*values: Any) -> Any:
    """Return a case that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def diagonal(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Return all pairs; the default tier has each value of both at least once."""
    count = min(len(first), len(second))
    return [(a, b) if (i + j) % count == 0 else ci(a, b) for i, a in enumerate(first) for j, b in enumerate(second)]
