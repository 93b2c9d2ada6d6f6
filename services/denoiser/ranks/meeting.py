"""Where the ranks of a group find each other."""

from __future__ import annotations

import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented there

_LOOPBACK = "127.0.0.1"


def open_store() -> tuple[TCPStore, tuple[str, int]]:
    """A store on a free port of the loopback, and its address; it closes when nobody holds it."""
    listener = socket.create_server((_LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, (_LOOPBACK, port)
