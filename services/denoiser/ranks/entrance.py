"""Where the ranks of other machines come in: they prove that they know the secret, and say which ones they are."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Collection
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from safelight.errors import CheckpointError

_log = logging.getLogger("safelight.ranks")

_SEND_SECONDS = 10  # a rank always reads: one that doesn't is frozen
_GREETING_SECONDS = 10
_LONGEST_NUMBER = 8
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A machine that is gone says nothing: its connection ends after 20 seconds, where the system has these options."""


class Entrance:
    """Listens for them.

    Args:
        address: host and port.
        secret: that they must know.

    Raises:
        CheckpointError: the address can't be listened on.
    """

    def __init__(self, address: tuple[str, int], secret: str) -> None:
        self.host = address[0]
        self._secret = secret.encode()
        try:
            self._listener = socket.create_server(address)
        except OSError as error:
            raise CheckpointError(
                f"master_address, master_port: {address[0]}:{address[1]}: {error.strerror}"
            ) from error

    def admit(self, ranks: Collection[int]) -> dict[int, Connection]:
        """A connection to each of these ranks, when all have come; who comes twice has come the last time.

        Raises:
            OSError: the entrance is closed.
        """
        admitted: dict[int, Connection] = {}
        while missing := set(ranks) - admitted.keys():
            _log.info("waiting for ranks of other machines", extra={"ranks": sorted(missing)})
            peer, _ = self._listener.accept()
            connection = connection_over(peer)
            try:
                admitted[self._greet(connection, ranks)] = connection
            except (AuthenticationError, EOFError, OSError, ValueError) as error:
                _log.warning("refused a rank: %s", error)
                connection.close()
        return admitted

    def _greet(self, connection: Connection, ranks: Collection[int]) -> int:
        """Which rank it is; whoever says nothing for too long is none."""
        _set_patience(connection, _GREETING_SECONDS)
        deliver_challenge(connection, self._secret)
        answer_challenge(connection, self._secret)
        rank = int(connection.recv_bytes(_LONGEST_NUMBER))
        if rank not in ranks:
            raise ValueError(f"there is no rank {rank} on another machine")
        _set_patience(connection, 0)
        return rank

    def close(self) -> None:
        """Whoever waits for ranks is told so."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def enter(address: tuple[str, int], secret: str, rank: int) -> Connection:
    """Come in as a rank, from another machine.

    Raises:
        OSError, EOFError: nobody is there, or he has gone.
        AuthenticationError: he has another secret.
    """
    connection = connection_over(socket.create_connection(address))
    try:
        answer_challenge(connection, secret.encode())
        deliver_challenge(connection, secret.encode())
        connection.send_bytes(str(rank).encode())
    except BaseException:
        connection.close()
        raise
    return connection


def connection_over(peer: socket.socket) -> Connection:
    """Messages over a socket, whose other end is soon known to be gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
    if peer.family != socket.AF_UNIX:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return Connection(peer.detach())


def _set_patience(connection: Connection, seconds: int) -> None:
    """Longest wait for the other end's next bytes; 0: no limit."""
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def hang_up(connection: Connection) -> None:
    """End a connection that others may be reading from, which are told so."""
    with socket.socket(fileno=os.dup(connection.fileno())) as ours, suppress(OSError):  # the other end may have
        ours.shutdown(socket.SHUT_RDWR)
