"""The rendezvous of a run's nodes: torch's c10d store, and the address by which each node is reached.

One node, that of the endpoint, serves the store; the others connect to it. torch can find out by itself which node
that is, but it ends with a traceback if a host's own name does not resolve, and takes an address of a second network
for another node's. So the launcher answers both questions, by binding to the address.
"""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import sys
from dataclasses import dataclass

from distlora.config import UserError
from distlora_launcher.compose.checks import resolve_endpoint, split_endpoint

LOCAL_ADDRESS = "DISTLORA_LOCAL_ADDR"
"""Environment variable: the address by which the other nodes reach this one, if it has several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """The rendezvous of a run's nodes, as this node sees it."""

    nodes: int
    """Number of nodes of the run."""
    endpoint: str
    """host:port, the same on each node."""
    run_id: str
    """Name of this start, which tells it from another at the same endpoint."""
    join_seconds: int
    """Longest wait until all nodes have joined, at the start and after a restart of the workers."""
    is_host: bool | None
    """True if this node serves the store; None if all nodes are this host, and the first process serves it."""
    address: str
    """Address by which the other nodes reach this one."""

    def environment(self) -> dict[str, str]:
        """Return the workers' variables: gloo's default is the host's address in /etc/hosts, on Debian 127.0.1.1."""
        interface = find_interface(self.address)
        return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}


def make_rendezvous(endpoint: str, *, nodes: int, run_id: str, join_seconds: float) -> Rendezvous:
    """Return this node's rendezvous arguments. Raises UserError for a host that it cannot resolve or reach."""
    host, port = split_endpoint(endpoint)
    address = resolve_endpoint(endpoint)
    is_host: bool | None
    is_host = _is_own_name(host) if ipaddress.ip_address(address).is_loopback else is_local_address(address)
    return Rendezvous(
        nodes=nodes,
        endpoint=endpoint,
        run_id=run_id,
        join_seconds=max(1, round(join_seconds)),
        is_host=is_host,
        address=os.environ.get(LOCAL_ADDRESS) or (host if is_host else source_address(address, port)),
    )


def is_local_address(address: str) -> bool:
    """Return whether an address belongs to this node: only then can it be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def source_address(address: str, port: int) -> str:
    """Return the address that this node sends from when it talks to `address`. Sends nothing."""
    if ipaddress.ip_address(address).is_loopback and _resolves(socket.gethostname()):
        return socket.gethostname()  # All nodes are this host: torch tells them apart by name.
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError as error:
            raise UserError(
                f"{socket.gethostname()} has no route to the rendezvous at {address} ({error.strerror}); name a host "
                "that all nodes can reach"
            ) from error
        return str(probe.getsockname()[0])


def find_interface(address: str) -> str | None:
    """Return the network interface that has an address or name; for loopback, the interface of the default route.

    None if it cannot be found, or the system is not Linux.
    """
    try:
        address = socket.gethostbyname(address)
        if ipaddress.ip_address(address).is_loopback:
            address = source_address("192.0.2.1", 9)  # An address reserved for documentation: gives the default route.
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


def connection_error(rendezvous: Rendezvous) -> str | None:
    """Return why the rendezvous endpoint cannot be connected to; None if it listens."""
    try:
        socket.create_connection(split_endpoint(rendezvous.endpoint), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_own_name(host: str) -> bool | None:
    """Return whether a host name at a loopback address is this node's; None for an address, which tells nothing.

    Nodes may share a machine, each with a name of its own: the tests' SLURM is such a cluster.
    """
    if host in (socket.gethostname(), socket.getfqdn()):
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return None
    return None if host == "localhost" else False


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
