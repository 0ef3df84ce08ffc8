"""What the ranks agree on while they work: to stop, and to save.

A signal reaches one rank alone, or one before another, and clocks differ; a rank that acted by itself would leave the
others in a collective. So at every boundary between two pieces of work (micro-batches, batches of an evaluation,
weights that are loaded) each rank says what it wishes, in two numbers whose maximum over all ranks is on its way while
they work on, and learns what all wished at the boundary before. Nobody waits for a rank that is not a whole piece of
work behind, and all act at the same boundary: the one after that at which the first of them wished.

The words go through a gloo group of their own. In the training group they would queue behind its collectives, and from
NCCL a number is read by waiting for the device.
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
    """Every rank makes one for a run and comes to the same boundaries in the same order."""

    def __init__(self, ranks: Ranks, *, save_minutes: float | None) -> None:
        """`save_minutes`: how long after one save the next is wished for; None: never."""
        assert (ranks.control is None) == (ranks.world == 1), "the words of several ranks need a group of their own"
        self.save_is_due = False
        """Whether the ranks have agreed to save after the step that is under way."""
        self._group = ranks.control
        self._save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self._counted_from = time.monotonic()
        self._under_way: tuple[Tensor, dist.Work] | None = None
        self._word = torch.zeros(2, dtype=torch.int64)
        """What is under way. One tensor for all words: a step whose memory is measured lets go nothing of earlier ones.
        """
        self._under_way_is_old = False
        """Whether the wish for a save that is under way is from before the last save."""

    def boundary(self, step: int | None, phase: str, part: int | None = None, *, long: bool = False) -> None:
        """Between two pieces of work: mark the next, as `watch.at` does, and act on what was agreed. Raises Stopped, on
        every rank alike.
        """
        watch.at(step, phase, part, long=long)
        if self._group is None:
            signum, save = self._wishes().tolist()
        else:
            signum, save = self._take()
        if signum > 0:
            raise Stopped(signum)
        if save > 0:
            # Before this rank's next word, so that one wish is for one save.
            self.save_is_due, self._counted_from = True, time.monotonic()
        if self._group is not None:
            word = self._wishes()
            self._under_way = word, dist.all_reduce(word, dist.ReduceOp.MAX, self._group, async_op=True)

    def saved(self) -> None:
        """Count the minutes anew; what was wished before this is no longer wished. Every rank calls it alike."""
        self.save_is_due, self._counted_from = False, time.monotonic()
        self._under_way_is_old = self._under_way is not None

    def end(self) -> None:
        """After the last boundary: wait for the word under way, whatever it says."""
        self._take()

    def _wishes(self) -> Tensor:
        """(2,) int64, until the next word: the signal that asked this process to stop, or 0; whether it is time to
        save."""
        save = time.monotonic() - self._counted_from >= self._save_seconds
        self._word[0], self._word[1] = stop_signals.requested() or 0, int(save)
        return self._word

    def _take(self) -> tuple[int, int]:
        """What all ranks wished at the boundary before; nothing at the first."""
        if self._under_way is None:
            return 0, 0
        (word, work), self._under_way = self._under_way, None
        work.wait()
        signum, save = word.tolist()
        if self._under_way_is_old:
            save, self._under_way_is_old = 0, False
        return signum, save
