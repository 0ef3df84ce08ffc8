"""The host:port where the nodes of a run rendezvous, split and resolved."""

from __future__ import annotations

import socket

from distlora.config import UserError


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Return (host, port) of host:port or [IPv6 address]:port."""
    host, _, port = endpoint.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def resolve_endpoint(endpoint: str) -> str:
    """Return the first address of an endpoint's host. Raises UserError if this node cannot resolve it."""
    host, port = split_endpoint(endpoint)
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(
            f"rendezvous endpoint {endpoint}: {socket.gethostname()} cannot resolve the host {host} "
            f"({error.strerror or error}); write its address, or a name that every node resolves"
        ) from error
