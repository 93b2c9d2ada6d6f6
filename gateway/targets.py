"""The addresses that a target of the settings stands for."""

from __future__ import annotations

import asyncio
import socket

_DNS_PREFIX = "dns:///"


async def addresses_of(target: str) -> set[str]:
    """What a target stands for now; a name that does not resolve stands for nothing."""
    if not target.startswith(_DNS_PREFIX):
        return {target}
    host, _, port = target.removeprefix(_DNS_PREFIX).rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return set()
    return {f"[{ip[0]}]:{port}" if family == socket.AF_INET6 else f"{ip[0]}:{port}" for family, _, _, _, ip in found}
