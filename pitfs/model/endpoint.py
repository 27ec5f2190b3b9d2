"""Endpoints, HOST:PORT: read, written, and whether one is on this machine. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

MAX_PORT: Final = 65535
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_LOOPBACK_NAMES: Final = ("localhost", "ip6-localhost")


def parse_endpoint(text: str, *, listening: bool = False) -> tuple[str, int]:
    """Reads "host:port" or "[address]:port".

    Args:
        listening: the host may be empty (all addresses) and the port 0 (a free one).

    Returns:
        host (an IPv6 address without its brackets) and port.

    Raises:
        ValueError: it is neither; the message is for the user.
    """
    host, colon, port = text.rpartition(":")
    lowest = 0 if listening else 1
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not lowest <= int(port) <= MAX_PORT:
        raise ValueError(f"{text!r} isn't HOST:PORT with a port from {lowest} to {MAX_PORT}")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        except ValueError:
            raise ValueError(f"{host!r} isn't an IPv6 address in brackets") from None
    if ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, as [::1]:7420")
    if not _HOST.fullmatch(host) and not (listening and not host):
        raise ValueError(f"{host!r} isn't a host name or address")
    return host, int(port)


def format_endpoint(host: str, port: int) -> str:
    """The inverse of `parse_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a name or address (IPv6 scope allowed) means this machine; nothing is looked up."""
    if host.lower() in _LOOPBACK_NAMES:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
