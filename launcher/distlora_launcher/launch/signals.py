"""Signals to the launcher as requests to stop.

The first SIGTERM, SIGUSR1, SIGHUP or SIGINT requests a save and a stop. Further ones change nothing (SLURM and users
send them twice), but a second Ctrl-C kills.
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
    """Forwards the first request to stop to the workers, even if they start later; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that requested a stop, if any."""
        self.killed = False
        """Whether a second Ctrl-C killed the process."""
        self._interrupts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._deliver: Callable[[int], None] | None = None

    def attach(self, process: subprocess.Popen[bytes], deliver: Callable[[int], None] | None = None) -> None:
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
def forwarding(signals: Sequence[signal.Signals] = FORWARDED) -> Iterator[Forwarder]:
    """Handle `signals` by a Forwarder for the duration. A signal that is ignored (SIGHUP under nohup) stays ignored."""
    forwarder = Forwarder()
    handled = [signum for signum in signals if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, forwarder) for signum in handled}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # `block` may have kept some pending.
    try:
        yield forwarder
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def block(signals: Sequence[signal.Signals] = FORWARDED) -> None:
    """Keep signals pending until `forwarding` handles them: by default SIGUSR1 kills a process that still imports."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
