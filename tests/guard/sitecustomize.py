"""Python imports this at start when its folder is on PYTHONPATH: a tested process reaches nothing but loopback."""

import ipaddress
import socket
import sys
from typing import Any

NAMES = {None, "", "localhost"}


def is_loopback(host: object) -> bool:
    """Return whether a host of a socket call stays on this machine."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in NAMES:
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what would leave the machine, as a machine without a network does."""
    if event == "socket.getaddrinfo" and not is_loopback(arguments[0]):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    if (
        event in {"socket.connect", "socket.sendto"}
        and isinstance(arguments[1], tuple)
        and not is_loopback(arguments[1][0])
    ):
        raise OSError(f"a test tried to reach {arguments[1]}")


sys.addaudithook(refuse)
