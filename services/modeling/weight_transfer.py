"""How weights come to a device: beside the computation on CUDA, in line with it elsewhere."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

_cuda: Any = torch.cuda  # its functions have no types

Moment: TypeAlias = Any
"""A point in the device's work that other work can wait for."""


class Transfer(Protocol):
    """Memory on both sides, and when it is copied between them; all sizes are bytes, all memory is uint8 [size]."""

    device: torch.device

    def home(self, size: int) -> Tensor:
        """Host memory that copies start from."""
        ...

    def room(self, size: int) -> Tensor:
        """Device memory."""
        ...

    def queue(self, copy: Callable[[], None], after: Moment) -> Moment:
        """Begin what `copy` starts on the device once `after` has passed; returns when it will be done."""
        ...

    def wait(self, moment: Moment) -> None:
        """Let what is computed from here on begin after that moment."""
        ...

    def now(self) -> Moment:
        """When everything computed up to here will be done."""
        ...

    def trim(self) -> None:
        """Let other processes have the device memory that was given back."""
        ...


def transfer_to(device: torch.device) -> Transfer:
    """The way to a device."""
    return CudaTransfer(device) if device.type == "cuda" else SynchronousTransfer(device)


class SynchronousTransfer:
    """Copies that are done when they return: for devices without streams of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def home(self, size: int) -> Tensor:
        """Ordinary memory."""
        return torch.empty(size, dtype=torch.uint8)

    def room(self, size: int) -> Tensor:
        """Memory of the device, a stretch of its own also where that is the host."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def queue(self, copy: Callable[[], None], after: Moment) -> Moment:
        """Copies at once: whatever came before is done."""
        copy()

    def wait(self, moment: Moment) -> None:
        """Nothing is ever pending."""

    def now(self) -> Moment:
        """Now."""

    def trim(self) -> None:
        """The device has no cache of ours."""


class CudaTransfer:
    """Copies from pinned memory on a stream of their own, so that they overlap with the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _cuda.Stream(device)

    def home(self, size: int) -> Tensor:
        """Page-locked memory."""
        pages = _LockedPages(-1, max(size, 1))
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        pages.lock(memory.data_ptr())
        return memory[:size]

    def room(self, size: int) -> Tensor:
        """Memory of the computation's stream."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def queue(self, copy: Callable[[], None], after: Moment) -> Moment:
        """Queues a copy on the copying stream."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            copy()
            return self._stream.record_event()

    def wait(self, moment: Moment) -> None:
        """Makes the computation's stream wait; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(moment)

    def now(self) -> Moment:
        """An event on the computation's stream."""
        return torch.cuda.current_stream(self.device).record_event()

    def trim(self) -> None:
        """Gives torch's cached blocks back to the driver."""
        torch.cuda.empty_cache()


class _LockedPages(mmap.mmap):
    """Pages registered with CUDA for as long as they exist.

    torch's own allocator of pinned memory rounds up to a power of two: 38 GiB for a network of 24.
    """

    _address = 0

    def lock(self, address: int) -> None:
        """Registers the pages, which lie at that address."""
        torch.cuda.check_error(int(_cuda.cudart().cudaHostRegister(address, len(self), 0)))
        self._address = address

    def __del__(self) -> None:
        if self._address:
            _cuda.cudart().cudaHostUnregister(self._address)
