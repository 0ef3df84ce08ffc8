"""Train so many steps whenever the parent process gives a turn, and report their figures.

A turn is a line of JSON on stdin: {"steps": n, "count": whether to count collectives}. End of file ends the cell.
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
    """The parent gives no more turns."""


class Turns:
    """The turns of a process: iterate and train a step each time, or call `begin` and `end` around each step.

    `note` records the step's loss.
    """

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

    def answer(self, **values: Any) -> None:
        """Send a line of JSON to the parent."""
        print(json.dumps(values), file=self._answers, flush=True)

    def note(self, loss: Tensor | float) -> None:
        """Record the current step's loss in nats per token, of this rank or of all."""
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def begin(self) -> None:
        """Wait for a turn and start the clock. Raises EndedError if there is none."""
        if self._left == 0:
            self._take_turn()
        self._synchronize()
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stop the clock after a step."""
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
            self._untimed = (
                0 if turn["count"] else 1
            )  # It allocates the memory again that was freed after the last turn.
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
            torch.cuda.empty_cache()  # For the other cells.
            left = torch.cuda.mem_get_info(self._device)[0]
        self._losses, self._times = [], []
        self.answer(
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
    """Return the bytes by kind."""
    return {
        kind: nbytes for kind in ("gathered", "scattered", "reduced", "broadcast") if (nbytes := collectives.of(kind))
    }
