"""What every file format of a checkpoint offers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

Shape = tuple[int, ...]


class TensorFile(Protocol):
    """One file of a checkpoint, its header read."""

    def keys(self) -> Collection[str]:
        """The names of the tensors."""
        ...

    def metadata(self) -> Mapping[str, str]:
        """What the header says in words."""
        ...

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, from the header alone."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, as numbers."""
        ...

    def stored(self, name: str) -> tuple[str, Tensor]:
        """The name of the type that the file has the tensor in, and its bytes as they are there."""
        ...
