"""What a lease holds: a tensor, and how to get at its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Payload(Protocol):
    """A tensor in whatever form its producer computes with; a consumer in the same process takes it as it is."""

    def buffer(self) -> memoryview:
        """Its bytes, C order, little-endian, as a flat view that stays valid while the payload lives."""
        ...


@dataclass(frozen=True)
class BytesPayload:
    """A tensor that came over the wire."""

    data: bytes | bytearray | memoryview

    def buffer(self) -> memoryview:
        return memoryview(self.data)
