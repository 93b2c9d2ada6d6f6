"""Where the ranks of a group find each other."""

from __future__ import annotations

import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented there

LOOPBACK = "127.0.0.1"


def loopback_interface() -> str:
    """Its name on this system; gloo would take the interface of the host's name, which others may reach."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def open_store(host: str) -> tuple[TCPStore, tuple[str, int]]:
    """A store on a free port of one of this machine's addresses, and where it is; it closes when nobody holds it."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, (host, port)
