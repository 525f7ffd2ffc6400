"""Where this host may be reached by the others: its IPv4 addresses and their interfaces."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915


def addresses() -> list[str]:
    """Of the interface that the user named (``GLOO_SOCKET_IFNAME``), else of all but the loopback."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    names = [named] if named else [name for _, name in socket.if_nameindex() if name != "lo"]
    return [address for address in map(address_of, names) if address]


def address_of(interface: str) -> str:
    """The IPv4 address of an interface; empty if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(found[20:24])


def interface_of(address: str) -> str:
    """The interface that has this address; empty if none has."""
    return next((name for _, name in socket.if_nameindex() if address_of(name) == address), "")
