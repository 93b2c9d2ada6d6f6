"""Memory that arriving tensors land in: taken from the system once, its pages touched once, then used again.

A fresh block of 64 MiB costs sixteen thousand page faults, which is more than the copy into it.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np

_SMALLEST_BYTES = 64 * 1024
_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_TOUCHED = getattr(mmap, "MAP_POPULATE", 0)


class BufferPool:
    """Buffers by size class. A buffer comes back by itself when its last view is gone, in whatever thread that is.

    Args:
        idle_bytes: most memory kept for later; what comes back beyond that goes to the system. 0: nothing is kept.
    """

    def __init__(self, idle_bytes: int) -> None:
        self._limit = idle_bytes
        # deque.append and deque.pop are atomic: a view may end inside a garbage collection, where a lock could block.
        self._idle: dict[int, deque[mmap.mmap]] = {}

    @property
    def idle_bytes(self) -> int:
        """Memory that waits for its next use."""
        return sum(size * len(regions) for size, regions in list(self._idle.items()))

    def take(self, size: int) -> memoryview:
        """A writable buffer of `size` bytes with any content, for as long as a view of it lives.

        Raises:
            MemoryError: the system has no more.
        """
        region = self._region(size_class(size))
        owner: Any = np.frombuffer(region, dtype=np.uint8)  # all views refer to it, so its end is the buffer's
        weakref.finalize(owner, self._give_back, region).atexit = False
        return memoryview(owner)[:size]

    def _region(self, capacity: int) -> mmap.mmap:
        try:
            return self._idle[capacity].pop()
        except (KeyError, IndexError):
            pass
        # What would not be kept is not worth touching: its header may lie about the size.
        flags = _MAP_FLAGS | (_TOUCHED if capacity <= self._limit else 0)
        try:
            return mmap.mmap(-1, capacity, flags=flags)
        except OSError as error:
            raise MemoryError(f"no memory for a tensor of {capacity} bytes") from error

    def _give_back(self, region: mmap.mmap) -> None:
        if self.idle_bytes + len(region) <= self._limit:
            self._idle.setdefault(len(region), deque()).append(region)


def size_class(size: int) -> int:
    """The capacity for a size: four classes a doubling, so that at most a fifth of it is unused."""
    if size <= _SMALLEST_BYTES:
        return _SMALLEST_BYTES
    quarter = 1 << max((size - 1).bit_length() - 3, 0)
    return -(-size // quarter) * quarter
