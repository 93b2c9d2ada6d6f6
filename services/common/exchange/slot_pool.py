"""Slots of anonymous shared memory, each tagged with the generation of what lies in it.

The memory has no name: it ends with the last process that has its descriptor, so no crash leaves any behind. Readers
get a descriptor that can't write, of memory that can't shrink under them. A slot may be used again while a slow reader
still looks at it; the reader then finds another generation than it was told, and drops what it read.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np

SLOT_BYTES = 1024 * 1024
_HEADER_BYTES = 4096  # a page, for the generation alone: bytes begin at a page
_STRIDE = _HEADER_BYTES + SLOT_BYTES
_GENERATION_BYTES = 8


class SlotPool:
    """A writer's slots. Memory is taken from the system when a slot is first used, and stays. Not thread-safe, but
    slots that are borrowed belong to their borrower, in whatever thread.

    Args:
        count: number of slots.

    Raises:
        OSError: the system has no such memory.
    """

    def __init__(self, count: int) -> None:
        descriptor = os.memfd_create("safelight-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, count * _STRIDE)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._memory: Any = np.frombuffer(mmap.mmap(descriptor, count * _STRIDE), np.uint8)
            self.reader_descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(descriptor)
        self._generations = [0] * count
        self._free = list(range(count))

    def borrow(self, count: int) -> list[int]:
        """So many slots, those used last first (they are in the processor's cache); none when fewer are free."""
        if count > len(self._free):
            return []
        borrowed, self._free = self._free[-count:], self._free[:-count]
        return borrowed

    def give_back(self, slots: list[int]) -> None:
        """The slots may be borrowed again."""
        self._free += slots

    def write(self, slot: int, piece: memoryview) -> tuple[int, int]:
        """Put a piece of at most SLOT_BYTES into a slot; returns where it lies, in bytes, and its generation."""
        self._generations[slot] += 1
        generation, base = self._generations[slot], slot * _STRIDE
        # Before the bytes: who reads the old number after its bytes has read none of the new.
        self._memory[base : base + _GENERATION_BYTES] = _as_bytes(generation)
        start = base + _HEADER_BYTES
        np.copyto(self._memory[start : start + piece.nbytes], np.frombuffer(piece, np.uint8))  # without the GIL
        return base, generation

    def close(self) -> None:
        """Let go of the memory; readers that have its descriptor keep it."""
        os.close(self.reader_descriptor)
        self._memory = None


class SlotReader:
    """A reader's view of another process's slots.

    Args:
        descriptor: as that process gave it; may be closed afterwards.

    Raises:
        OSError, ValueError: it is no memory that can be read safely.
    """

    def __init__(self, descriptor: int) -> None:
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the holder's memory could shrink, which would kill its readers")
        self._memory: Any = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)

    def read(self, base: int, generation: int, into: memoryview) -> bool:
        """Fill the view from the slot at byte `base`; False when the slot holds something else by now.

        Raises:
            ValueError: there is no such slot.
        """
        start = base + _HEADER_BYTES
        if base < 0 or start + into.nbytes > self._memory.nbytes:
            raise ValueError(f"no slot at byte {base}")
        np.copyto(np.frombuffer(into, np.uint8), self._memory[start : start + into.nbytes])  # without the GIL
        return bool(np.array_equal(self._memory[base : base + _GENERATION_BYTES], _as_bytes(generation)))


def _as_bytes(generation: int) -> Any:
    return np.frombuffer(generation.to_bytes(_GENERATION_BYTES, "little"), np.uint8)
