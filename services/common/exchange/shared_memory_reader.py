"""The consumer's end of shared memory; see shared_memory_server.py."""

from __future__ import annotations

import os
import socket
import struct

from safelight.v1.tensor_pb2 import TensorLease
from services.common.exchange.digests import running_digest
from services.common.exchange.host import host_identity, is_own_user, socket_name
from services.common.exchange.shared_memory_server import GREETING, PIECE, SILENCE_SECONDS
from services.common.exchange.slot_pool import SlotReader


class SharedMemoryError(Exception):
    """The tensor can't be had by this way; the chunk stream is left."""


def is_near(lease: TensorLease) -> bool:
    """Whether the lease's holder shares memory with this host."""
    return bool(lease.host) and lease.host == host_identity()


def read_shared(lease: TensorLease, buffer: memoryview) -> bytes:
    """Fill the buffer with a leased tensor; returns the digest of what came. Blocks: for a thread.

    Raises:
        SharedMemoryError: the holder does not answer, has no slot free, or has something else under that ticket.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(SILENCE_SECONDS)
            connection.connect(socket_name(lease.exchange_id))
            if not is_own_user(connection):
                raise SharedMemoryError("the holder belongs to another user")
            connection.send(lease.ticket.encode())
            return _receive(connection, buffer)
    except (OSError, ValueError, struct.error) as error:
        raise SharedMemoryError(str(error)) from error


def _receive(connection: socket.socket, buffer: memoryview) -> bytes:
    greeting, descriptors, _, _ = socket.recv_fds(connection, GREETING.size, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if len(descriptors) != 1 or GREETING.unpack(greeting) != (buffer.nbytes,):
            raise SharedMemoryError("the holder has no free slot, or no such tensor")
        return _copy(connection, SlotReader(descriptors[0]), buffer)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _copy(connection: socket.socket, slots: SlotReader, buffer: memoryview) -> bytes:
    filled, received = 0, running_digest()
    while filled < buffer.nbytes:
        base, generation, size = PIECE.unpack(connection.recv(PIECE.size))
        piece = buffer[filled : filled + size]
        if not 0 < size == piece.nbytes:
            raise SharedMemoryError("the holder sent more than the tensor has")
        if not slots.read(base, generation, piece):
            raise SharedMemoryError("the slot was used again before it was read")
        received.update(piece)  # while it is in the processor's cache
        filled += size
        connection.send(b"\x01")
    return received.digest()
