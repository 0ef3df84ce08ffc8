"""Ranks that DeepSpeed has for itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.preference_data import (
    preferences,  # noqa: F401  (a fixture)
    prepare,  # noqa: F401  (a fixture)
)
from support.worlds import World, start_world


class Alone:
    """Start worlds of two and three ranks when needed; each piece of work has its own default process group.

    DeepSpeed broadcasts within that group. It numbers parameters and units as long as a process lives, and compares the
    numbers: a rank that sat out a run of two would have others than these two.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._worlds: dict[int, World] = {}

    def run(self, size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        world = 2 if size == 2 else 3
        if world not in self._worlds:
            self._worlds[world] = self._stack.enter_context(start_world(world, regroups=True))
        return self._worlds[world].run(size, function, **arguments)


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    with contextlib.ExitStack() as stack:
        yield Alone(stack)
