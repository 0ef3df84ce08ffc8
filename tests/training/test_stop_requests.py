"""Signals become requests to stop, from a worker's first moment; ranks act on the maximum of their words together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from distlora.parallel import Ranks, watch
from distlora.parallel.watch import Control
from distlora.system import stop_signals
from distlora.system.stop_signals import Stopped
from support.worlds import World

WORKER = """
import time
from distlora.system import stop_signals
stop_signals.listen()
print("listening", flush=True)
while stop_signals.requested() is None:
    time.sleep(0.01)
print(stop_signals.name_of(stop_signals.requested()), flush=True)
while True:
    time.sleep(1)
"""


def send(signum: signal.Signals, pid: int) -> None:
    """From a process that is not the receiver's parent."""
    subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(signum)})"], check=True)


def ignore() -> None:
    for signum in stop_signals.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_signals_ask_whoever_started_the_worker_and_sigterm_from_its_parent_ends_it() -> None:
    """Also where the parent ignores them: its children then do, until they listen. And where its log is full."""
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(
            [sys.executable, "-c", WORKER], stdout=subprocess.PIPE, stderr=full, text=True, preexec_fn=ignore
        ) as worker,
    ):
        assert worker.stdout is not None
        assert worker.stdout.readline() == "listening\n"
        send(signal.SIGUSR1, worker.pid)
        assert worker.stdout.readline() == "SIGUSR1\n"
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            send(signum, worker.pid)
        time.sleep(0.1)
        assert worker.poll() is None, "asked again it goes on to its save"
        worker.send_signal(signal.SIGTERM)
        try:
            assert worker.wait(timeout=10) == 128 + signal.SIGTERM
        finally:
            worker.kill()


def words_of(ranks: Ranks, *, asking: dict[int, int], boundaries: int) -> tuple[int, int]:
    """Return (the boundary, counted from 0, at which this rank stops; the signal).

    Rank r requests the stop before boundary `asking[r]`.
    """
    words = Control(ranks.control, save_minutes=None)
    try:
        for boundary in range(boundaries):
            if asking.get(ranks.rank) == boundary:
                stop_signals.request((signal.SIGHUP, signal.SIGTERM)[ranks.rank % 2])
            words.boundary(boundary, "working")
    except Stopped as stop:
        return boundary, stop.signum
    finally:
        stop_signals.forget()
        words.end()
    return -1, 0


@pytest.mark.parametrize(
    ("asking", "expected"),
    [
        ({1: 3}, (4, signal.SIGTERM)),
        ({0: 2, 1: 2}, (3, signal.SIGTERM)),
        ({0: 5, 1: 3}, (4, signal.SIGTERM)),
        ({}, (-1, 0)),
    ],
)
def test_ranks_stop_at_the_boundary_after_the_first_request(
    world: World, asking: dict[int, int], expected: tuple[int, int]
) -> None:
    assert world.run(3, words_of, asking=asking, boundaries=8) == [expected] * 3


def test_one_process_stops_at_once() -> None:
    single = Ranks(0, 1, torch.device("cpu"), None)
    assert words_of(single, asking={0: 3}, boundaries=8) == (3, signal.SIGHUP)


def saves_of(ranks: Ranks, *, boundaries: int, every: int, anyway: int | None) -> list[int]:
    """Return the boundaries at which a save is made.

    These are each `every`th, where it is due, and the one where it is `anyway`. Each rank has a clock of its own rate,
    a second or more per boundary.
    """
    made, now = [], 0.0
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
        words = Control(ranks.control, save_minutes=10 / 60)
        for boundary in range(boundaries):
            words.boundary(boundary, "working")
            if boundary == anyway or (words.save_is_due and boundary % every == 0):
                made.append(boundary)
                words.saved()
            now += 1.0 + 0.25 * ranks.rank
        words.end()
    return made


def test_ranks_whose_clocks_differ_save_at_the_same_boundaries_once_a_period(world: World) -> None:
    """The fastest clock wishes after 8 boundaries, the ranks know at the next, and save after the step under way."""
    assert world.run(2, saves_of, boundaries=40, every=3, anyway=None) == [[9, 18, 27, 36]] * 2


def test_a_wish_that_a_save_has_met_is_not_met_again(world: World) -> None:
    """The fastest clock's word of boundary 8 is under way while they save there."""
    assert world.run(2, saves_of, boundaries=20, every=1, anyway=8) == [[8, 17]] * 2
