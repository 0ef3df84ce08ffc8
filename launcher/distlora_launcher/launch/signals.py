"""Requests to stop: what a launcher makes of the signals that reach it.

The first SIGTERM, SIGUSR1, SIGHUP or SIGINT asks for a save and an end; more of them change nothing (SLURM and
impatient people send them twice), except a second Ctrl-C, which kills.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Forwarder:
    """Passes the first request to stop on to those who work, whenever they come; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that asked to stop; None: none did."""
        self.killed = False
        """Whether a second Ctrl-C ended the process at once."""
        self._interrupts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._deliver: Callable[[int], None] | None = None

    def attach(self, process: subprocess.Popen[bytes], deliver: Callable[[int], None] | None = None) -> None:
        """From now on requests go to `deliver`, by default as a signal to `process`, which a second Ctrl-C kills. One
        that came before is passed on now.
        """
        self._process, self._deliver = process, deliver or process.send_signal
        if self.received is not None:
            self._deliver(self.received)

    def detach(self) -> None:
        """The process has ended."""
        self._process = self._deliver = None

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
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
def forwarding(signals: Sequence[signal.Signals] = FORWARDED) -> Iterator[Forwarder]:
    """Handle `signals` by a Forwarder for the duration; but those that whoever started this has it ignore, as nohup
    does with SIGHUP, stay ignored.
    """
    forwarder = Forwarder()
    heard = [signum for signum in signals if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, forwarder) for signum in heard}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # `hold` may have kept some.
    try:
        yield forwarder
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def hold(signals: Sequence[signal.Signals] = FORWARDED) -> None:
    """Keep signals until `forwarding` takes them: by default SIGUSR1 kills a process that is still importing."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
