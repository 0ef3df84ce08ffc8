"""Read a process' anonymous memory and the loopback interface's bytes, and find a free port. Imports no torch."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

_PERIOD_SECONDS = 0.002


def isolate_network() -> bool:
    """Move this process and its future children into a network namespace that has only a loopback interface.

    Returns False where the system refuses: only root on Linux may do this.
    """
    new_network, set_flags, up = 0x40000000, 0x8914, 0x1  # CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(new_network) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up))
    return True


def loopback_bytes() -> int:
    """Return the bytes received over the loopback interface so far; 0 where Linux does not report them."""
    table = Path("/proc/self/net/dev")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")), 0)


def free_port() -> int:
    """Return a free TCP port of the loopback interface, for a rendezvous of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def anonymous_bytes(process: int | str = "self") -> int:
    """Return RssAnon of a process, in bytes. RuntimeError where Linux does not report it."""
    with open(f"/proc/{process}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no RssAnon; this measurement needs Linux 4.5 or newer")


class PeakMemory:
    """Sample this process' anonymous memory: `with PeakMemory() as memory: ...`, then `memory.peak` in bytes.

    The peak is relative to the memory at the start. Anonymous memory is what counts against a job's limit and cannot be
    dropped.
    """

    def __enter__(self) -> PeakMemory:
        self.start = anonymous_bytes()
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes() - self.start)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, anonymous_bytes() - self.start)
            time.sleep(_PERIOD_SECONDS)
