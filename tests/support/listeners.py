"""TCP sockets on which the processes of a run listen, read from /proc. Linux only."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path
from typing import NamedTuple

import psutil

LISTENS = "0A"
"""TCP_LISTEN in /proc/net/tcp."""


class Listener(NamedTuple):
    """A socket that accepts connections."""

    process: str
    """Pid and command line."""
    address: str
    port: int

    @property
    def is_open(self) -> bool:
        """True if it accepts connections of other machines."""
        return not ipaddress.ip_address(self.address).is_loopback


def listeners(pid: int) -> list[Listener]:
    """Return the TCP listeners of a process and all its descendants, each in its own network namespace."""
    found: list[Listener] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(OSError, psutil.Error):  # It has ended.
                found += _of_process(process)
    return found


def _of_process(process: psutil.Process) -> list[Listener]:
    folder = Path("/proc", str(process.pid))
    sockets = set()
    for name in os.listdir(folder / "fd"):
        with contextlib.suppress(OSError):  # It was closed.
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(folder / "fd" / name))
            sockets |= {match[1]} if match else set()
    rows = [row.split() for table in ("tcp", "tcp6") for row in (folder / "net" / table).read_text().splitlines()[1:]]
    name = f"{process.pid} {' '.join(process.cmdline())}"
    return [Listener(name, *_endpoint(row[1])) for row in rows if row[3] == LISTENS and row[9] in sockets]


def _endpoint(text: str) -> tuple[str, int]:
    """Return (address, port) of hexadecimal digits: the address in 32-bit words of the host's byte order."""
    words, port = text.split(":")
    data = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    address = ipaddress.ip_address(data)
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1 takes IPv4 connections to loopback.
    return str(mapped or address), int(port, 16)
