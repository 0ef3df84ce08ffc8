"""This machine's loopback interface: a network of its own for a measurement, its bytes, a port. Imports no torch."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import sys
from pathlib import Path


def take_own_network() -> bool:
    """Move this process, and those that it starts, into a network of their own that is but a loopback interface.

    False where the system does not let it: only root on Linux may.
    """
    new_network, set_flags, up = 0x40000000, 0x8914, 0x1  # CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(new_network) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up))
    return True


def loopback_bytes() -> int:
    """Bytes that have come in over the loopback interface of this process' network; 0 where Linux does not say."""
    table = Path("/proc/self/net/dev")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")), 0)


def free_port() -> int:
    """Of this machine's loopback interface, where ranks can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
