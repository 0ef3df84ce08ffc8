"""Marks of what each rank does, at which ranks agree to stop or save, and by which ranks that hang are found.

A rank that hangs ends the run, and the report says where each rank is (README.md, Hang watch).

The training thread marks its position (`at`), which is one assignment. One thread posts the position to the workers'
store every second. The other notices that its rank has not moved for too long, and reads all positions twice. Every
rank must mark alike: a mark's number is its position in the run and is compared among ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistError, PrefixStore, TCPStore

from distlora.run_folder import error_file
from distlora.system import stop_signals
from distlora.system.exit_codes import FAILED
from distlora.system.stop_signals import Stopped

LONG_SECONDS = 3600.0
"""Seconds that ranks may wait for each other outside steps.

While one rank syncs a checkpoint to disk the others wait. 384 GB (adapter=full on 32B: fp32 weights and optimizer
states) take longer than ten minutes below 640 MB/s."""
SILENT_SECONDS = 60.0
"""Seconds without a post after which a rank counts as stopped or gone.

A node that writes 100 GB, or a library that holds the GIL, delays posts by many seconds."""
BEAT_SECONDS = 1.0
"""Seconds between two posts; less if the limit is below ten of them."""

READ_SECONDS = 2.0
"""Seconds in which the launcher reads the error and kills all ranks: one that is stopped hears no other signal."""

_ALARM = "alarm"
_STOPPED = "its process is stopped, or its node is down"
_COLLECTIVES = (str(Path(torch.__file__).parent / "distributed"), str(Path(__file__).parent))
"""Folders whose code waits for other ranks."""
_OURS = str(Path(__file__).parents[1])

_Mark = tuple[int, int | None, str, int | None, bool, int]
_here: _Mark = (0, None, "starting", None, True, 0)
"""(number of the mark, step, phase, part, long, signs of progress since) of the training thread."""


Marker = Callable[..., None]
"""`at`, or a function that also agrees with the other ranks (`Control.boundary`) and may raise to end the work."""


class HungError(RuntimeError):
    """Report ranks that have not moved for as long as they may."""


def at(step: int | None, phase: str, part: int | None = None, *, long: bool = False) -> None:
    """Mark the position of the training thread: the `part`-th piece (from 1) of `phase` in `step` (from 1), if in one.

    `long`: others may wait up to LONG_SECONDS for it. Costs 0.1 us: no lock, no system call.
    """
    global _here
    _here = (_here[0] + 1, step, phase, part, long, 0)


def moved() -> None:
    """Report progress at the last mark, for work that ends by time limits of its own. Ranks need not call it alike."""
    global _here
    _here = (*_here[:5], _here[5] + 1)


class Control:
    """Let all ranks agree to stop or to save, without waiting for each other.

    A signal reaches one rank alone, and clocks differ. So at every boundary between two pieces of work each rank starts
    an all-reduce (max) of its requests and reads the result of the boundary before: all act at the same boundary. Every
    rank makes one and reaches the same boundaries in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, save_minutes: float | None) -> None:
        """Start without a request.

        group: `Ranks.control`, a gloo group of its own: behind the training collectives the all-reduce would queue, and
        reading a number from NCCL waits for the device. save_minutes: minutes between saves; None: never by the clock.
        """
        self.save_is_due = False
        """True once the ranks have agreed to save after the current step."""
        self._group = group
        self._save_seconds = math.inf if save_minutes is None else 60 * save_minutes
        self._counted_from = time.monotonic()
        self._under_way: tuple[Tensor, dist.Work] | None = None
        self._word = torch.zeros(2, dtype=torch.int64)
        """Pending all-reduce. One tensor serves all of them, so that a step whose memory is measured frees nothing
        earlier."""
        self._under_way_is_old = False
        """True if the pending request for a save was made before the last save."""

    def boundary(self, step: int | None, phase: str, part: int | None = None, *, long: bool = False) -> None:
        """Mark the next piece of work, as `at` does, and act on the agreement.

        Raises Stopped, on every rank alike.
        """
        at(step, phase, part, long=long)
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


@dataclass(frozen=True, slots=True)
class Position:
    """Position that a rank posts to the others."""

    mark: int
    place: str
    """The mark as text: `step 41 (backward of micro-batch 2)`."""
    long: bool
    code: str = ""
    """Line of our code that its training thread is in; empty while it moves."""
    waits: bool = False
    """True within a collective."""
    beat: int = 0
    """Counter that grows while the process lives."""
    moves: int = 0
    """Signs of progress since the mark."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Reason why no rank moves."""

    message: str
    culprits: tuple[int, ...]
    """Ranks that the others wait for; empty if all are in the same place."""
    silent: bool
    """True if the culprits no longer post, which does not depend on how long their work takes."""


class Watch:
    """The two threads. `end(error, verdict)` is called once, in one of them, and must end the process."""

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        world: int,
        *,
        timeout_seconds: float,
        end: Callable[[HungError, Verdict], None],
        long_seconds: float = LONG_SECONDS,
        silent_seconds: float | None = None,
    ) -> None:
        """Start the threads. `silent_seconds`: None: a minute, or half of `timeout_seconds` if that is less."""
        self.rank, self.world = rank, world
        self._limit, self._long_limit = timeout_seconds, max(timeout_seconds, long_seconds)
        self._silent_seconds = min(SILENT_SECONDS, timeout_seconds / 2) if silent_seconds is None else silent_seconds
        self._end = end
        self._beat_seconds = min(BEAT_SECONDS, timeout_seconds / 10)
        self._host, self._port = store.host, store.port
        self._store = self._connect()
        self._heard = time.monotonic()
        """Time of the store's last answer."""
        self._ended, self._requested, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._answer: list[Position | None] = []
        self._raises_alarm = False
        self._alarmed = threading.Event()
        """Set when some rank is about to end the run."""
        if rank == 0:  # So that `get` never waits for a key.
            for key in (*map(str, range(world)), _ALARM):
                self._store.set(key, "")
        self._threads = [
            threading.Thread(target=self._tell, name="watch: tells", daemon=True),
            threading.Thread(target=self._look, name="watch: looks", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the watch: ranks may leave at different times from here on."""
        self._ended.set()

    def _connect(self) -> PrefixStore:
        """Open a connection: a store is locked while a thread waits in it. Raises DistError without an answer."""
        # Keys of an earlier attempt may still exist if torch keeps one store through restarts.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"watch/{attempt}", TCPStore(self._host, self._port, wait_for_workers=False))

    def _tell(self) -> None:
        """Post this rank's position, check for an alarm, read the others on request.

        Only this thread talks to the store: once the rank that holds it is stopped, no call returns, with any timeout.
        """
        beat, last = 0, _here
        while not self._ended.is_set():
            try:
                while not self._ended.wait(self._beat_seconds):
                    beat, moves, last = beat + 1, _here is not last, _here
                    self._exchange(own_position(last, moves=moves, beat=beat))
            except DistError:
                try:  # The connection was dropped,
                    self._store = self._connect()
                except DistError:
                    return  # or the store's holder has left or died. `_ask` gets no answer then.

    def _exchange(self, position: Position) -> None:
        self._store.set(str(self.rank), json.dumps(asdict(position)))
        if self._raises_alarm:
            self._store.set(_ALARM, str(self.rank))
        if self._store.get(_ALARM):
            self._alarmed.set()
        if self._requested.is_set():
            texts = [self._store.get(str(rank)) for rank in range(self.world)]
            self._answer = [Position(**json.loads(text)) if text else None for text in texts]
            self._requested.clear()
            self._answered.set()
        self._heard = time.monotonic()

    def _look(self) -> None:
        """Follow the marks of this rank, and judge when it has not moved for too long."""
        last, still, before, shown = _here, 0.0, time.monotonic(), False
        previous: tuple[float, list[Position | None] | None] | None = None
        """Seconds without a mark at the first request, and its answer."""
        while not self._ended.wait(self._beat_seconds):
            now = time.monotonic()
            moved, last = _here is not last, _here
            # While the whole process was stopped (SIGSTOP, a suspended job) nobody waited.
            still = 0.0 if moved else still + min(now - before, 5 * self._beat_seconds)
            before = now
            if self._alarmed.is_set() and not shown:
                shown = True
                self._show_stacks()
            if still <= self._limit - self._silent_seconds:  # The reads, so far apart, lie within the limit.
                previous = None
                continue
            if previous is None:
                previous = still, self._ask()
            if still < previous[0] + self._silent_seconds:
                continue
            verdict, previous = self._judge(previous[1], self._ask(), still), None
            if verdict is None or _here is not last or self._ended.is_set():
                continue
            if not shown:
                self._show_stacks()
            self._raises_alarm = True
            self._ended.wait(3 * self._beat_seconds)  # The other ranks print their stacks meanwhile.
            self._end(HungError(verdict.message), verdict)
            return

    def _judge(
        self, first: list[Position | None] | None, second: list[Position | None] | None, still: float
    ) -> Verdict | None:
        """Return the verdict after `still` seconds without a mark, from two reads of the positions.

        None: some rank moves, or may take longer, or it is too early to decide.
        """
        if time.monotonic() - self._heard > self._silent_seconds:
            silence = "rank 0, through which the ranks hear of each other, gives no sign of life"
            return Verdict(f"{_still(still)}: {silence} ({_STOPPED}); waiting: {self._own_place()}", (0,), silent=True)
        if first is None or second is None:
            return None
        verdict = judge(first, second, still)
        if verdict is None or verdict.silent or still > self._long_limit:
            return verdict
        waited_for = (second[rank] for rank in verdict.culprits or range(self.world))
        return None if any(position is not None and position.long for position in waited_for) else verdict

    def _ask(self) -> list[Position | None] | None:
        """Return each rank's last position, None for a rank without one; None if the store does not answer."""
        self._answered.clear()
        self._requested.set()
        return self._answer if self._answered.wait(max(5 * self._beat_seconds, 1.0)) else None

    def _own_place(self) -> str:
        return _places({self.rank: own_position(_here, moves=False)})

    def _show_stacks(self) -> None:
        with contextlib.suppress(OSError):  # A full disk must not end this thread.
            print(f"{self._own_place()}. Python stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def own_position(mark: _Mark, *, moves: bool, beat: int = 0) -> Position:
    """Return this rank's position at `mark`."""
    number, step, phase, part, long, signs = mark
    within = phase if part is None else f"{phase} {part}"
    code, waits = ("", False) if moves else whereabouts()
    return Position(number, within if step is None else f"step {step} ({within})", long, code, waits, beat, signs)


def whereabouts() -> tuple[str, bool]:
    """Return (innermost line of our code in the training thread and innermost function, within a collective or not)."""
    training = threading.main_thread()
    assert training.ident is not None
    # A backward on a GPU runs hooks in a thread of autograd, not of Python. A thread that saves may wait for another
    # rank without delaying training.
    aside = {thread.ident for thread in threading.enumerate() if not thread.name.startswith("Dummy")}
    threads = sys._current_frames()
    # A frame that refers to itself is freed by the garbage collector only, and all other frames here with it: each look
    # would keep the training thread's tensors alive, such as the dequantized weights of a backward.
    del threads[threading.get_ident()]
    frames = {ident: frame for ident, frame in threads.items() if ident == training.ident or ident not in aside}
    waits = any(frame.f_code.co_filename.startswith(_COLLECTIVES) for frame in frames.values())
    innermost = frame = frames.get(training.ident)
    if innermost is None:
        return "", waits
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    frame = frame or innermost
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {innermost.f_code.co_name}", waits


def judge(first: Sequence[Position | None], second: Sequence[Position | None], seconds: float) -> Verdict | None:
    """Return the verdict from two reads of all positions, `seconds` apart; None if one rank moves."""
    silent = []
    for rank, (before, after) in enumerate(zip(first, second, strict=True)):
        if before is not None and after is not None and (before.mark, before.moves) != (after.mark, after.moves):
            return None
        if after is None or (before is not None and before.beat == after.beat):
            silent.append(rank)
    positions = {rank: position for rank, position in enumerate(second) if position is not None}
    if silent:
        rest = {rank: position for rank, position in positions.items() if rank not in silent}
        lost = "; ".join(
            f"rank {rank} gives no sign of life ({_STOPPED}), last in {positions[rank].place}"
            if rank in positions
            else f"rank {rank} has not come"
            for rank in silent
        )
        message = f"{_still(seconds)}: {lost}; waiting: {_places(rest)}"
        return Verdict(message, tuple(silent), silent=all(rank in positions for rank in silent))
    outside = {rank: position for rank, position in positions.items() if not position.waits} or positions
    least = min(position.mark for position in outside.values())
    culprits = {rank: position for rank, position in outside.items() if position.mark == least}
    if len(culprits) == len(positions):
        return Verdict(f"{_still(seconds)}: {_places(positions)}, and no other is behind", (), silent=False)
    rest = {rank: position for rank, position in positions.items() if rank not in culprits}
    message = f"{_still(seconds)}: {_places(culprits)}; waiting for that: {_places(rest)}"
    return Verdict(message, tuple(culprits), silent=False)


def _still(seconds: float) -> str:
    return f"nothing has moved for {seconds:.0f} s"


def _places(positions: Mapping[int, Position]) -> str:
    """Format positions: `rank 2 is in step 41 (backward) at trainer.py:88; ranks 0, 1 are in ...`."""
    together: dict[tuple[str, str], list[int]] = {}
    for rank, position in positions.items():
        together.setdefault((position.place, position.code), []).append(rank)
    return "; ".join(
        f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))} {'are' if len(ranks) > 1 else 'is'} in "
        + place
        + (f" at {code}" if code else "")
        for (place, code), ranks in together.items()
    )


def end_process(error: HungError, verdict: Verdict) -> None:
    """Leave the error for the launcher and end this process, whatever its threads wait for."""
    try:
        error_file.leave(error, about=min(verdict.culprits, default=None))
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:  # Both writes fail on a full disk.
        time.sleep(READ_SECONDS)
        os._exit(FAILED)
