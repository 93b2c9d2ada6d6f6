"""Messages between the service and a rank: pickles, whose tensors travel beside them as raw bytes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pickle import PickleBuffer
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Packed = Sequence[bytes | memoryview]
"""A pickle, and the bytes of each of its tensors."""


def pack(message: object) -> Packed:
    """A message, ready to be sent; its tensors may be on any device."""
    packed, tensors = io.BytesIO(), list[memoryview]()
    _Pickler(packed, pickle.HIGHEST_PROTOCOL, buffer_callback=lambda buffer: tensors.append(buffer.raw())).dump(message)
    return [packed.getvalue(), *tensors]


def unpack(packed: Packed) -> Any:
    """The message of a peer that is trusted; its tensors are on the CPU."""
    return pickle.loads(packed[0], buffers=packed[1:])


class Channel:
    """One end of the connection between the service and a rank."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, packed: Packed) -> None:
        """Send a message that is packed already, as it may go to several ranks.

        Raises:
            OSError: the other end is closed, or takes nothing for too long.
        """
        self.connection.send_bytes(str(len(packed)).encode())
        for part in packed:
            self.connection.send_bytes(part)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError, OSError: the other end is closed.
        """
        parts = int(self.connection.recv_bytes())
        return unpack([self.connection.recv_bytes() for _ in range(parts)])


class _Pickler(pickle.Pickler):
    """Sends what pickle doesn't, and tensors: torch's own way would share memory, a descriptor for each."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, MappingProxyType):
            return _read_only, (dict(value),)
        if not isinstance(value, Tensor):
            return NotImplemented
        flat: Any = value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (PickleBuffer(flat), value.dtype, tuple(value.shape))


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A copy, in memory that torch has aligned: the rounding of some matrix products follows the alignment."""
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    return tensor
