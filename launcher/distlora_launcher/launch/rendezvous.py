"""Where the machines of one run meet, and by which address each is reached. Imports no torch.

torchrun's c10d rendezvous: one machine, that of the endpoint, holds a small store; the others connect to it. torchrun
looks up by itself whether it is that machine, but it ends with a traceback where a host's own name does not resolve,
and takes a second network's address for another machine's; so both questions are answered here, by binding.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from distlora.config import UserError
from distlora_launcher.compose.endpoint import resolve_endpoint, split_endpoint
from distlora_launcher.terminal.output import show

LOCAL_ADDRESS = "DISTLORA_LOCAL_ADDR"
"""Environment variable: the address by which the other machines reach this one, where it has several."""

READ_SECONDS = 60
"""Of a question to the store. A machine that has vanished without a word (power, cable) does not answer."""
CLOSE_SECONDS = 30
"""For telling the others that this machine leaves."""
LAST_CALL_SECONDS = 1
"""For machines beyond the number that is needed: there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """How this machine takes part."""

    nodes: int
    """Machines of the run."""
    endpoint: str
    """host:port, the same on each."""
    run_id: str
    """Tells this start from another at the same endpoint."""
    join_seconds: int
    """How long a machine waits until all are there: at the start, and again when workers start anew."""
    is_host: bool | None
    """Whether the store is here; None: whoever comes first on this host has it (all machines are this one)."""
    address: str
    """By which the others reach this machine."""

    def torchrun_arguments(self) -> list[str]:
        settings = {
            "join_timeout": self.join_seconds,
            "last_call_timeout": LAST_CALL_SECONDS,
            "close_timeout": CLOSE_SECONDS,
            "read_timeout": READ_SECONDS,
        }
        if self.is_host is not None:
            settings["is_host"] = int(self.is_host)
        return [
            f"--nnodes={self.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={self.run_id}",
            "--rdzv-conf=" + ",".join(f"{name}={value}" for name, value in settings.items()),
            f"--local-addr={self.address}",
        ]

    def environment(self) -> dict[str, str]:
        """Variables of the workers: gloo otherwise takes the address that the host's own name has in /etc/hosts, which
        on Debian is 127.0.1.1.
        """
        interface = interface_of(self.address)
        return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}


def meet(endpoint: str, *, nodes: int, run_id: str, join_seconds: float) -> Meeting:
    """This machine's part in a meeting at `endpoint`. Raises UserError for a host that it does not know."""
    host, port = split_endpoint(endpoint)
    address = resolve_endpoint(endpoint)
    is_host: bool | None
    if ipaddress.ip_address(address).is_loopback:
        is_host = True if host in (socket.gethostname(), socket.getfqdn()) else None
    else:
        is_host = is_here(address)
    return Meeting(
        nodes=nodes,
        endpoint=endpoint,
        run_id=run_id,
        join_seconds=max(1, round(join_seconds)),
        is_host=is_host,
        address=os.environ.get(LOCAL_ADDRESS) or (host if is_host else own_address(address, port)),
    )


def is_here(address: str) -> bool:
    """Whether an address is one of this machine's: only then can it be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def own_address(address: str, port: int) -> str:
    """The address that this machine sends from when it talks to `address`. Nothing is sent."""
    if ipaddress.ip_address(address).is_loopback and _resolves(socket.gethostname()):
        return socket.gethostname()  # All machines are this one: names tell them apart.
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError as error:
            raise UserError(
                f"{socket.gethostname()} has no way to {address}, where the machines are to meet ({error.strerror}); "
                f"name a host that all machines reach"
            ) from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address (a name is resolved first); for a loopback address of a
    machine that is not alone, that of its way out. None where that cannot be told.
    """
    try:
        address = socket.gethostbyname(address)
        if ipaddress.ip_address(address).is_loopback:
            address = own_address("192.0.2.1", 9)  # Reserved for documentation: the way out, whoever is there.
    except (OSError, UserError):
        return None
    if sys.platform != "linux":
        return None
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:  # An interface without an IPv4 address.
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def wait_for_host(meeting: Meeting, stopped: Callable[[], bool]) -> None:
    """Wait until the store of another machine listens: torchrun itself gives up after a minute. Raises UserError after
    `join_seconds`; returns early once `stopped()`.
    """
    if meeting.is_host is not False:
        return
    deadline, said = time.monotonic() + meeting.join_seconds, False
    while not stopped():
        try:
            socket.create_connection(split_endpoint(meeting.endpoint), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"nobody listened at {meeting.endpoint} for {meeting.join_seconds} s ({reason}); `distlora resume` the "
                "run on each machine, that one too, or correct the endpoint and let the port through"
            )
        if not said:
            show(f"waiting for {meeting.endpoint} to listen ({reason})\n")
            said = True
        time.sleep(1)


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
