"""Listen on one address instead of on all interfaces of a node."""

import ipaddress
import socket


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address of `host` alone. Raises OSError, for one if the port is in use.

    That is its IPv4 address, which other nodes know most surely, if it has one. It listens on all if `host` is a name
    that is loopback here (Debian's /etc/hosts) and another address elsewhere.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, *_, address = min(addresses, key=lambda item: item[0] != socket.AF_INET)
    if ipaddress.ip_address(address[0]).is_loopback and host not in (address[0], "localhost"):
        both = socket.has_dualstack_ipv6()
        return socket.create_server(("", port), family=socket.AF_INET6 if both else family, dualstack_ipv6=both)
    return socket.create_server((str(address[0]), port), family=family)
