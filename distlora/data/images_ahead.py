"""Tensors of the images of coming rows, made by threads while a step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from distlora.data.rows import StoredImages

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = 2
"""One decodes and resizes about as fast as a GPU trains; the second is for rows of many small images."""

_Key = tuple[int, int]
"""(step, number of the row among those of the rank)."""


class RowImages:
    """The images of one row: iterating gives the tensors of each by name, on the CPU.

    They are kept until they are read once, and made again if they are read a second time.
    """

    def __init__(self, ahead: ImagesAhead, key: _Key, numbers: range) -> None:
        self._ahead, self._key, self._numbers = ahead, key, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._ahead.take(self._key, self._numbers))


class ImagesAhead:
    """Makes tensors ahead of their use, in two threads. Results do not depend on it."""

    def __init__(self, stored: StoredImages, make: Callable[[bytes], dict[str, Tensor]], rows: int) -> None:
        """`rows`: number of rows with images that are made ahead of the one that is read."""
        self._stored, self._make, self._rows = stored, make, rows
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
        self._order: list[_Key] = []
        """Rows with images of the last step and the one after it."""
        self._numbers: dict[_Key, range] = {}
        self._started: dict[_Key, list[Future[dict[str, Tensor]]]] = {}

    def step(self, step: int, rows: list[int], following: list[int]) -> Iterator[RowImages]:
        """Yield the images of the rows of a step; those of the next one, `following`, are made ahead."""
        keys = [(at, number) for at, of_step in ((step, rows), (step + 1, following)) for number in range(len(of_step))]
        self._numbers = dict(zip(keys, map(self._stored.of, rows + following), strict=True))
        self._order = [key for key in keys if self._numbers[key]]
        self._started = {key: made for key, made in self._started.items() if key in self._numbers}
        self._start(0)
        return iter([RowImages(self, key, self._numbers[key]) for key in keys[: len(rows)]])

    def take(self, key: _Key, numbers: range) -> list[dict[str, Tensor]]:
        """Return the tensors of a row's images, and start those of the rows after it."""
        if not numbers:
            return []
        made = self._started.pop(key, None) or self._submit(numbers)
        if key in self._order:
            self._start(self._order.index(key) + 1)
        return [tensors.result() for tensors in made]

    def _start(self, first: int) -> None:
        for key in self._order[first : first + self._rows]:
            if key not in self._started:
                self._started[key] = self._submit(self._numbers[key])

    def _submit(self, numbers: range) -> list[Future[dict[str, Tensor]]]:
        return [self._pool.submit(self._one, number) for number in numbers]

    def _one(self, number: int) -> dict[str, Tensor]:
        return self._make(self._stored.read(number))
