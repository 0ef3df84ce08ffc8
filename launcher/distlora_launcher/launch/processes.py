"""A process identified across nodes, reboots and containers, and signals to the launcher as requests to stop.

A pid alone is reused, and containers have equal ones. The first SIGTERM, SIGUSR1, SIGHUP or SIGINT requests a save and
a stop. Further ones change nothing (SLURM and users send them twice), but a second Ctrl-C kills.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

_LARGEST_PID = 2**22
"""Largest pid of Linux."""
_STARTED = 18
"""Index of the start time in /proc/PID/stat, counted after the state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process on some node. The last three fields are None on a system without /proc."""

    host: str
    pid: int
    started: int | None = None
    """Start time, in clock ticks since the node booted."""
    boot: str | None = None
    """Boot id of the node."""
    namespace: str | None = None
    """Pid namespace: that of the node, or of a container."""

    @property
    def is_of_this_machine(self) -> bool:
        """Return True if the pid is valid in this process's node and container."""
        return (self.host, self.boot, self.namespace) == (host_name(), _boot(), _namespace())

    @property
    def has_ended(self) -> bool | None:
        """Return True if the process has ended; None if this node cannot tell."""
        if not self.is_of_this_machine:
            return None
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
        except OSError:
            return None if _exists(self.pid) else True
        # From the third field on: the second is a name, which may have spaces.
        state, *fields = stat.rpartition(")")[2].split()
        return state in "ZX" or int(fields[_STARTED]) != self.started

    def send(self, signum: int) -> None:
        """Send a signal. Raises ProcessLookupError if the process has ended, PermissionError if another user's."""
        if self.has_ended or not self.is_of_this_machine:
            raise ProcessLookupError(f"process {self.pid} of {self.host} has ended")
        os.kill(self.pid, signum)


def host_name() -> str:
    """Return this node's host name without its domain."""
    return socket.gethostname().partition(".")[0] or "localhost"


def this_process() -> Process:
    """Return the calling process."""
    pid, started = os.getpid(), None
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        started = int(stat.rpartition(")")[2].split()[1 + _STARTED])
    return Process(host=host_name(), pid=pid, started=started, boot=_boot(), namespace=_namespace())


def from_record(values: Mapping[str, Any]) -> Process | None:
    """Return the process that a record names; None for a damaged record."""
    host, pid, started = values.get("host"), values.get("pid"), values.get("started")
    # kill(0) and kill(-1) would signal many processes.
    if not isinstance(host, str) or type(pid) is not int or not 1 < pid <= _LARGEST_PID:
        return None
    boot, namespace = values.get("boot"), values.get("namespace")
    return Process(
        host=host,
        pid=pid,
        started=started if isinstance(started, int) else None,
        boot=boot if isinstance(boot, str) else None,
        namespace=namespace if isinstance(namespace, str) else None,
    )


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # Another user's process, which /proc may hide.
        return True
    return True


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
HANDLED_BY_TORCH = signal.SIGQUIT
"""The one signal that torch's agent is told to handle by itself: it takes at least one."""


class Receiver(Protocol):
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
        self._process: Receiver | None = None
        self._deliver: Callable[[int], None] | None = None

    def attach(self, process: Receiver, deliver: Callable[[int], None] | None = None) -> None:
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
