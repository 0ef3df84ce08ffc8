"""A request to stop: signals become one, and the ranks agree on where to answer it (`parallel/stop_and_save.py`).

Imports no torch: a worker listens from its first moment, long before torch is imported. A request is answered with a
save, so nothing happens within the signal itself; asking again changes nothing.
"""

import contextlib
import os
import signal
import sys
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that request a stop: schedulers and `kill`, SLURM's --signal, Ctrl-C, a terminal that closes."""
STOPPED_NAME = "stopped.json"
"""File in RUN about a requested stop: `{step, checkpoint, signal, time}`."""
TO_WORKERS: dict[int, int] = {signal.SIGTERM: signal.SIGUSR2}
"""Signals by which the launcher passes on a request: from it, SIGTERM means that torch's agent ends the worker."""

_request: int | None = None


class Stopped(Exception):
    """Raised by every rank at the same step after a requested stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopping on {name_of(signum)}")
        self.signum = signum


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
