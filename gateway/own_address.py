"""The address at which denoisers fetch checkpoints from the gateway."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

_WILDCARDS = ("0.0.0.0", "[::]")
_LOOPBACK = "127.0.0.1"


async def own_address(address: str, denoisers: Sequence[str]) -> str:
    """The gateway's address, with one of its own in the place of a wildcard: that of its way to the denoisers.

    Args:
        address: as advertised, or bound.
        denoisers: their targets, from the settings.
    """
    host, _, port = address.rpartition(":")
    if host not in _WILDCARDS:
        return address
    for target in denoisers:
        own = await asyncio.to_thread(_way_to, target.removeprefix("dns:///"))
        if own:
            return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"
    return f"{_LOOPBACK}:{port}"


def _way_to(target: str) -> str:
    """The address of this machine that packets to a target would carry; empty: it is no address of a network."""
    host, _, port = target.rpartition(":")
    if target.startswith("unix") or not port.isdecimal():
        return ""
    try:
        family, kind, protocol, _, peer = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(peer)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""
