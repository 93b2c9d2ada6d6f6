"""Messages between the service and a rank: pickles whose tensors travel as raw bytes."""

from __future__ import annotations

import io
import pickle
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack(message: object) -> memoryview:
    """The bytes of a message; its tensors may be on any device."""
    packed = io.BytesIO()
    _Pickler(packed, pickle.HIGHEST_PROTOCOL).dump(message)
    return packed.getbuffer()


def unpack(packed: bytes) -> Any:
    """The message of these bytes, of a peer that is trusted; its tensors are on the CPU."""
    return pickle.loads(packed)


class Channel:
    """One end of the connection between the service and a rank."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, packed: memoryview) -> None:
        """Send a message that is packed already, as it may go to several ranks.

        Raises:
            OSError: the other end is closed, or takes nothing for too long.
        """
        self.connection.send_bytes(packed)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError, OSError: the other end is closed.
        """
        return unpack(self.connection.recv_bytes())


class _Pickler(pickle.Pickler):
    """Sends what pickle doesn't, and tensors: torch's own way would share memory, a descriptor for each."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, MappingProxyType):
            return _read_only, (dict(value),)
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        return _tensor, (bytes(flat.numpy()), value.dtype, tuple(value.shape))


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A copy, in memory that torch has aligned: the rounding of some matrix products follows the alignment."""
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    return tensor
