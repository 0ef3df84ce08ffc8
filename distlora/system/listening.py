"""Listen on one address instead of on all interfaces of a node."""

import ipaddress
import socket


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address of `host` alone. Raises OSError, for one if the port is in use.

    It listens on all if `host` is a name that is loopback here (Debian's /etc/hosts) and another address elsewhere.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    is_alias = ipaddress.ip_address(address[0]).is_loopback and address[0] != host
    return socket.create_server(("" if is_alias else str(address[0]), port), family=family)
