"""The producer's end of shared memory: hands leased tensors to other processes of its host and user.

A consumer connects to an abstract unix socket and names a ticket. It gets the descriptor of this process's slots and
then, for each piece of the tensor, where it lies; it acknowledges each, and so gives its slot back. Both sides copy at
the same time, and a tensor that no other process asks for is never copied at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from safelight.errors import LeaseExpiredError
from services.common.exchange.host import host_identity, is_own_user, socket_name
from services.common.exchange.slot_pool import SLOT_BYTES, SlotPool
from services.common.exchange.tensor_store import TensorStore

GREETING = struct.Struct("<Q")
"""Size of the tensor; comes with the descriptor."""
PIECE = struct.Struct("<qQQ")
"""Base of the slot in bytes, generation, bytes in it."""
SILENCE_SECONDS = 2.0
"""Longest wait for the other side; then its slots are taken back."""
MAX_TICKET_BYTES = 256
_SLOTS_A_TRANSFER = 4
_PAUSE_SECONDS = 0.1

_log = logging.getLogger("safelight.exchange")


class SharedMemoryServer:
    """Serves one store's tensors. Confined to the event loop; the copying is done by threads of its own.

    Args:
        store: the leases.
        pool_bytes: most memory for the slots. With too few free slots for a transfer, the consumer is turned away.
    """

    def __init__(self, store: TensorStore, pool_bytes: int) -> None:
        self._store = store
        self._slot_count = pool_bytes // SLOT_BYTES
        self._threads = ThreadPoolExecutor(max(1, self._slot_count // _SLOTS_A_TRANSFER), "shared-memory")
        self._slots: SlotPool | None = None
        self._listener: socket.socket | None = None
        self._waiting: asyncio.TimerHandle | None = None
        self._serving: dict[asyncio.Task[None], socket.socket] = {}

    def start(self) -> None:
        """Begin to serve, and say so in the leases; where the system lacks what it takes, leases just don't say so."""
        if self._slot_count < _SLOTS_A_TRANSFER or not host_identity():
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            listener.bind(socket_name(self._store.exchange_id))
            listener.listen()
            self._slots = SlotPool(self._slot_count)
        except OSError as error:
            listener.close()
            _log.warning("no shared memory: %s", error)
            return
        self._listener = listener
        self._listen(listener)
        self._store.share_within(host_identity())

    async def close(self) -> None:
        """End the transfers and let go of the memory."""
        if self._listener is None or self._slots is None:
            return
        listener, self._listener = self._listener, None
        asyncio.get_running_loop().remove_reader(listener)
        if self._waiting is not None:
            self._waiting.cancel()
        for connection in self._serving.values():
            with contextlib.suppress(OSError):  # the other side may have ended it
                connection.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(*self._serving, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        listener.close()
        self._slots.close()

    def _listen(self, listener: socket.socket) -> None:
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Begin one transfer. Nothing is awaited from its coming until `close` knows of it."""
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # too many open files: consumers wait in line meanwhile
            _log.warning("no shared-memory transfer could begin: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            self._waiting = loop.call_later(_PAUSE_SECONDS, self._listen, listener)
            return
        connection.setblocking(False)
        task = asyncio.create_task(self._serve(connection))
        self._serving[task] = connection
        task.add_done_callback(self._serving.pop)

    async def _serve(self, connection: socket.socket) -> None:
        """One transfer. Ending the connection early is the whole refusal: the consumer takes the chunk stream."""
        assert self._slots is not None
        slots: list[int] = []
        try:
            data = await self._asked_for(connection)
            if data is not None and (slots := self._slots.borrow(_SLOTS_A_TRANSFER)):
                transfer = _Transfer(connection, self._slots, slots, data)
                await asyncio.get_running_loop().run_in_executor(self._threads, transfer.run)
        except (OSError, asyncio.TimeoutError) as error:
            _log.info("a shared-memory transfer ended early: %s", error)
        finally:
            self._slots.give_back(slots)
            connection.close()

    async def _asked_for(self, connection: socket.socket) -> memoryview | None:
        """The bytes that the other side may have and asks for."""
        if not is_own_user(connection):
            return None
        receiving = asyncio.get_running_loop().sock_recv(connection, MAX_TICKET_BYTES)
        ticket = await asyncio.wait_for(receiving, SILENCE_SECONDS)
        try:
            return self._store.get_bytes(ticket.decode("ascii", "replace"))
        except LeaseExpiredError:
            return None


class _Transfer:
    """Puts one tensor's bytes through a few slots; runs on a thread."""

    def __init__(self, connection: socket.socket, pool: SlotPool, slots: list[int], data: memoryview) -> None:
        self._connection = connection
        self._pool = pool
        self._free = deque(slots)
        self._in_use: deque[int] = deque()
        self._data = data

    def run(self) -> None:
        """Returns when all is read.

        Raises:
            OSError: the consumer has ended the connection, or has gone silent.
        """
        self._connection.settimeout(SILENCE_SECONDS)
        greeting = GREETING.pack(self._data.nbytes)
        socket.send_fds(self._connection, [greeting], [self._pool.reader_descriptor])
        for start in range(0, self._data.nbytes, SLOT_BYTES):
            if not self._free:
                self._await_one()
            self._send(self._data[start : start + SLOT_BYTES])
        while self._in_use:
            self._await_one()

    def _send(self, piece: memoryview) -> None:
        slot = self._free.popleft()
        self._in_use.append(slot)
        base, generation = self._pool.write(slot, piece)
        self._connection.send(PIECE.pack(base, generation, piece.nbytes))

    def _await_one(self) -> None:
        """Wait until the oldest piece is read."""
        if not self._connection.recv(1):
            raise ConnectionError("the consumer has gone")
        self._free.append(self._in_use.popleft())
