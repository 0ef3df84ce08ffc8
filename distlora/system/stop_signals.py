"""Signals as requests to stop: the launcher passes the first one on, a worker takes it, all ranks agree where to stop.

The ranks agree in `parallel/watch.py` (Control). A request is answered with a save, so nothing happens within the
signal itself. Further ones change nothing (SLURM and users send them twice), but a second Ctrl-C kills. Imports no
torch: a worker listens from its first moment, long before torch is imported.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol

from distlora.system import atomic_io

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that request a stop: schedulers and `kill`, SLURM's --signal, Ctrl-C, a terminal that closes."""
STOPPED_NAME = "stopped.json"
"""File in RUN about a requested stop: `{step, checkpoint, signal, time}`."""
TO_WORKERS: dict[int, int] = {signal.SIGTERM: signal.SIGUSR2}
"""Signals by which the launcher passes on a request: from it, SIGTERM means that torch's agent ends the worker."""
HANDLED_BY_TORCH = signal.SIGQUIT
"""The one signal that torch's agent is told to handle by itself: it takes at least one."""


class StopReceiver(Protocol):
    """Receiver of requests to stop: a process, or the agent of several."""

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""

    def send_signal(self, signum: int) -> None:
        """Send a signal."""

    def kill(self) -> None:
        """Kill it."""


class Forwarder:
    """Forwards the first request to stop to the workers, even if they start later; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that requested a stop, if any."""
        self.killed = False
        """True if a second Ctrl-C killed the process."""
        self._interrupts = 0
        self._process: StopReceiver | None = None
        self._deliver: Callable[[int], None] | None = None

    def attach(self, process: StopReceiver, deliver: Callable[[int], None] | None = None) -> None:
        """Send requests to `deliver`, by default as a signal to `process`; a request that came before is sent now."""
        self._process, self._deliver = process, deliver or process.send_signal
        if self.received is not None:
            self._deliver(self.received)

    def detach(self) -> None:
        """Stop forwarding: the process has ended."""
        self._process = self._deliver = None

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        self._interrupts += signum == signal.SIGINT
        first = self.received is None
        if first:
            self.received = signum
        if self._process is None or self._deliver is None or self._process.poll() is not None:
            return
        if self._interrupts > 1:
            self.killed = True
            self._process.kill()
        elif first:
            self._deliver(signum)
            if signum == signal.SIGINT and sys.stderr.isatty():
                print("\nstopping after a save; Ctrl-C again kills the workers", file=sys.stderr)


@contextlib.contextmanager
def forwarding() -> Iterator[Forwarder]:
    """Handle SIGNALS by a Forwarder for the duration. A signal that is ignored (SIGHUP under nohup) stays ignored."""
    forwarder = Forwarder()
    handled = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, forwarder) for signum in handled}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `block` may have kept some pending.
    try:
        yield forwarder
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def block() -> None:
    """Keep SIGNALS pending until `forwarding` handles them: by default SIGUSR1 kills a process that still imports."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


_request: int | None = None


class Stopped(Exception):
    """Raised by every rank at the same step after a requested stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopping on {name_of(signum)}")
        self.signum = signum


def write_stopped(run_dir: Path, signum: int, newest: Path | None) -> None:
    """Write RUN/stopped.json with the newest checkpoint, which continues the run."""
    record = {
        "step": 0 if newest is None else int(newest.name.partition("_")[2]),
        "checkpoint": None if newest is None else str(newest.relative_to(run_dir)),
        "signal": name_of(signum),
        "time": round(time.time(), 3),
    }
    atomic_io.write_json(run_dir / STOPPED_NAME, record)


def request(signum: int) -> None:
    """Ask this process to stop when it next can; the first request names the signal."""
    global _request
    if _request is None:
        _request = signum


def requested() -> int | None:
    """Return the signal that asked to stop, or None."""
    return _request


def forget() -> None:
    """Drop the request: for a process that goes on to another run."""
    global _request
    _request = None


def name_of(signum: int) -> str:
    """Return the name of a signal, SIGTERM for 15."""
    return signal.Signals(signum).name


def listen() -> None:
    """Turn signals into requests from now on.

    First of all in a process: threads and children inherit that these signals are blocked, so that one sent to every
    process (SLURM does) does not end a compiler, say, under the worker that is about to save. (wandb's process unblocks
    them: `trackers/wandb_run.py`.)
    """
    parent = os.getppid()
    signals = {*SIGNALS, *TO_WORKERS.values()}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for signum in signals:
        # Whoever started this may ignore them, as nohup does: such a signal is dropped, blocked or not.
        signal.signal(signum, signal.SIG_DFL)
    threading.Thread(target=_take, args=(parent, signals), name="signals", daemon=True).start()


def _take(parent: int, signals: set[int]) -> None:
    names = {passed_on: signum for signum, passed_on in TO_WORKERS.items()}
    while True:
        if sys.platform == "darwin":  # The system does not tell the sender.
            signum, sender = signal.sigwait(signals), 0
        else:
            received = signal.sigwaitinfo(signals)
            signum, sender = received.si_signo, received.si_pid
        if signum == signal.SIGTERM and sender == parent:
            # torch's agent ends a group that is broken. Nobody is left to agree with, and a worker that waits in a
            # collective would hold up the restart until the agent kills it, 30 s later.
            os._exit(128 + signum)
        signum = names.get(signum, signum)
        request(signum)
        with contextlib.suppress(OSError):  # A full disk. This thread must hear what comes next all the same.
            print(f"{name_of(signum)} from process {sender}: stopping when all ranks can", file=sys.stderr, flush=True)
