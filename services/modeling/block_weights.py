"""A block's parameters where they are kept and where they compute; each of these places is one stretch of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from services.modeling.mapped_memory import release_mapped

_ALIGNMENT = 256  # bytes; what CUDA's own allocations have


class FlatLayout:
    """Where tensors lie in one stretch of memory.

    Args:
        tensors: of their shapes and dtypes; the order of their dimensions in memory is kept.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [torch.empty_like(tensor, device="meta") for tensor in tensors]
        self._starts, self.size = [], 0
        for tensor in tensors:
            self._starts.append(self.size)
            self.size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def stretches(self, memory: Tensor) -> list[Tensor]:
        """The bytes of each."""
        return [
            memory[start : start + tensor.nbytes] for tensor, start in zip(self._tensors, self._starts, strict=True)
        ]

    def show(self, parameters: Sequence[nn.Parameter], memory: Tensor) -> None:
        """Make parameters those that lie there."""
        for parameter, view in zip(parameters, self._views(memory), strict=True):
            parameter.data = view

    def move(self, parameters: Sequence[nn.Parameter], memory: Tensor) -> None:
        """Copy parameters there, one by one, and leave the memory that they were in."""
        for parameter, view in zip(parameters, self._views(memory), strict=True):
            loaded = parameter.data
            parameter.data = view.copy_(loaded)
            release_mapped(loaded)

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            stretch.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
            for tensor, stretch in zip(self._tensors, self.stretches(memory), strict=True)
        ]


class BlockWeights(Protocol):
    """A block's parameters, which have a home and a room to compute in.

    Attributes:
        name: of the block.
        size: bytes of the room.
        home_size: bytes of the home.
        home_on_device: whether the home is device memory, too.
    """

    name: str
    size: int
    home_size: int
    home_on_device: bool

    def settle(self, home: Tensor) -> None:
        """Copy the parameters to their home, for good."""
        ...

    def show(self, room: Tensor) -> None:
        """Make the parameters those that lie in a room."""
        ...

    def retire(self, home: Tensor) -> None:
        """Make the parameters what is seen of them at home."""
        ...

    def fetch(self, home: Tensor, room: Tensor) -> None:
        """Begin to copy the parameters into a room, or a larger one."""
        ...


Flatten: TypeAlias = Callable[[str, Sequence[nn.Parameter]], BlockWeights]
"""From the name of a block and its parameters to these as they are kept."""


class FlatWeights:
    """A block's parameters as one stretch of memory, wherever it is: one copy moves them all.

    Args:
        name: of the block.
        parameters: they keep their dtypes and the order of their dimensions in memory.
    """

    home_on_device = False

    def __init__(self, name: str, parameters: Sequence[nn.Parameter]) -> None:
        self.name = name
        self._parameters = parameters
        self._layout = FlatLayout(parameters)
        self.size = self.home_size = self._layout.size

    def settle(self, home: Tensor) -> None:
        """Copy the parameters there, for good."""
        self._layout.move(self._parameters, home)

    def show(self, room: Tensor) -> None:
        """Make the parameters those that lie there."""
        self._layout.show(self._parameters, room)

    def retire(self, home: Tensor) -> None:
        """The same: at home all of them are seen."""
        self._layout.show(self._parameters, home)

    def fetch(self, home: Tensor, room: Tensor) -> None:
        """All in one copy."""
        room[: self.size].copy_(home, non_blocking=True)
