"""Let all ranks agree to stop or to save, without waiting for each other.

A signal reaches one rank alone, and clocks differ. So at every boundary between two pieces of work each rank starts an
all-reduce (max) of its requests and reads the result of the boundary before: all act at the same boundary. It uses a
gloo group of its own: behind the training collectives it would queue, and reading a number from NCCL waits for the
device.
"""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from distlora.parallel import watch
from distlora.parallel.ranks import Ranks
from distlora.system import stop_signals
from distlora.system.stop_signals import Stopped


class Control:
    """Agreement of all ranks of a run. Every rank makes one and reaches the same boundaries in the same order."""

    def __init__(self, ranks: Ranks, *, save_minutes: float | None) -> None:
        """Start without a request. `save_minutes`: minutes between saves; None: never by the clock."""
        assert (ranks.control is None) == (ranks.world == 1), "several ranks need a control group"
        self.save_is_due = False
        """True once the ranks have agreed to save after the current step."""
        self._group = ranks.control
        self._save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self._counted_from = time.monotonic()
        self._under_way: tuple[Tensor, dist.Work] | None = None
        self._word = torch.zeros(2, dtype=torch.int64)
        """Pending all-reduce. One tensor serves all of them, so that a step whose memory is measured frees nothing
        earlier."""
        self._under_way_is_old = False
        """True if the pending request for a save was made before the last save."""

    def boundary(self, step: int | None, phase: str, part: int | None = None, *, long: bool = False) -> None:
        """Mark the next piece of work, as `watch.at` does, and act on the agreement.

        Raises Stopped, on every rank alike.
        """
        watch.at(step, phase, part, long=long)
        if self._group is None:
            signum, save = self._wishes().tolist()
        else:
            signum, save = self._take()
        if signum > 0:
            raise Stopped(signum)
        if save > 0:
            # Before this rank's next request, so that one request leads to one save.
            self.save_is_due, self._counted_from = True, time.monotonic()
        if self._group is not None:
            word = self._wishes()
            self._under_way = word, dist.all_reduce(word, dist.ReduceOp.MAX, self._group, async_op=True)

    def saved(self) -> None:
        """Restart the clock and drop earlier requests to save. Every rank calls it alike."""
        self.save_is_due, self._counted_from = False, time.monotonic()
        self._under_way_is_old = self._under_way is not None

    def end(self) -> None:
        """Wait for the pending all-reduce after the last boundary, and ignore its result."""
        self._take()

    def _wishes(self) -> Tensor:
        """Return (2,) int64, valid until the next call: the signal that this process got, or 0; 1 if a save is due."""
        save = time.monotonic() - self._counted_from >= self._save_seconds
        self._word[0], self._word[1] = stop_signals.requested() or 0, int(save)
        return self._word

    def _take(self) -> tuple[int, int]:
        """Return the requests of all ranks at the boundary before; zeros at the first."""
        if self._under_way is None:
            return 0, 0
        (word, work), self._under_way = self._under_way, None
        work.wait()
        signum, save = word.tolist()
        if self._under_way_is_old:
            save, self._under_way_is_old = 0, False
        return signum, save
