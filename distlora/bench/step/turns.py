"""A cell's side of taking turns: it trains so many steps whenever its parent says so, and answers what they took.

A line of JSON on stdin is a turn, {"steps": n, "count": whether its collectives are counted}; the end of stdin is the
end of the cell.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from torch import Tensor

from distlora.bench.collectives import Collectives


class EndedError(Exception):
    """There are no more turns."""


class Turns:
    """`for _ in turns: ...` runs a step each time; or `begin` and `end` around each. `note` is told its loss."""

    def __init__(self, device: torch.device, answers: TextIO) -> None:
        self._device, self._answers = device, answers
        self._left = self._untimed = 0
        self._losses: list[Tensor | float] = []
        self._times: list[tuple[float, float]] = []
        self._counting: Collectives | None = None
        self._counts = contextlib.ExitStack()

    def __iter__(self) -> Iterator[None]:
        with contextlib.suppress(EndedError):
            while True:
                self.begin()
                yield
                self.end()

    def tell(self, **words: Any) -> None:
        """A line to the parent."""
        print(json.dumps(words), file=self._answers, flush=True)

    def note(self, loss: Tensor | float) -> None:
        """The loss of the step that is under way: nats a token, of this rank or of all."""
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def begin(self) -> None:
        """Before a step; waits for its turn. Raises EndedError where there is none."""
        if self._left == 0:
            self._take_turn()
        self._synchronize()
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """After a step."""
        self._synchronize()
        now = time.perf_counter(), time.process_time()
        if self._untimed > 0:
            self._untimed -= 1
        else:
            self._times.append((now[0] - self._began[0], now[1] - self._began[1]))
        self._left -= 1
        if self._left == 0:
            self._answer()

    def _take_turn(self) -> None:
        line = sys.stdin.readline()
        if not line:
            raise EndedError
        turn = json.loads(line)
        self._left = turn["steps"]
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._untimed = 0 if turn["count"] else 1  # It takes the memory again that was given back after the last.
            self._left += self._untimed
        self._counting = self._counts.enter_context(Collectives()) if turn["count"] else None

    def _answer(self) -> None:
        self._counts.close()
        losses = [float(loss) for loss in self._losses]
        assert len(losses) >= len(self._times), "a step without a loss"
        seconds, cpu_seconds = zip(*self._times, strict=True)
        counting, peak, left = self._counting, None, None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.empty_cache()  # For the cells whose turn is next.
            left = torch.cuda.mem_get_info(self._device)[0]
        self._losses, self._times = [], []
        self.tell(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            losses=losses,
            device_peak=peak,
            device_left=left,
            moved=None if counting is None else moved(counting),
        )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def moved(collectives: Collectives) -> dict[str, int]:
    """Bytes by kind, as `Collectives` counts them."""
    return {
        kind: nbytes for kind in ("gathered", "scattered", "reduced", "broadcast") if (nbytes := collectives.of(kind))
    }
