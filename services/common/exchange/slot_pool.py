"""Slots of anonymous shared memory, each tagged with the generation of what lies in it.

The memory has no name: it ends with the last process that has its descriptor, so no crash leaves any behind. Readers
get a descriptor that can't write, of memory that can't shrink under them. A slot may be used again while a slow reader
still looks at it; the reader then finds another generation than it was told, and drops what it read.
"""

from __future__ import annotations

import fcntl
import os

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
        self._descriptor = os.memfd_create("safelight-tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, count * _STRIDE)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.reader_descriptor = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._descriptor)
            raise
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
        os.pwrite(self._descriptor, generation.to_bytes(_GENERATION_BYTES, "little"), base)
        written = 0
        while written < piece.nbytes:
            written += os.pwrite(self._descriptor, piece[written:], base + _HEADER_BYTES + written)
        return base, generation

    def close(self) -> None:
        """Let go of the memory; readers that have its descriptor keep it."""
        os.close(self._descriptor)
        os.close(self.reader_descriptor)


def read_slot(descriptor: int, base: int, generation: int, into: memoryview) -> bool:
    """Fill the view from a slot; False when the slot holds something else by now.

    Raises:
        OSError: there is no such slot.
    """
    filled = 0
    while filled < into.nbytes:
        count = os.preadv(descriptor, [into[filled:]], base + _HEADER_BYTES + filled)
        if count == 0:
            raise OSError(f"no slot at byte {base}")
        filled += count
    return int.from_bytes(os.pread(descriptor, _GENERATION_BYTES, base), "little") == generation
