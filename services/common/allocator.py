"""glibc's allocator, told to keep what is freed, or to give it back.

By default it gives every larger block back to the system when it is freed, and touches each page anew the next time. A
message of 1 MiB costs more that way than the copies of its bytes (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os

# From <malloc.h>. Setting either also stops glibc from moving it.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 32 * 1024**2  # the most that glibc allows itself
_KEPT_BYTES = 256 * 1024**2


def keep_freed_memory() -> None:
    """Keep blocks up to 32 MiB, 256 MiB in all, for their next use, unless the environment says otherwise."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Give the system back what is freed but kept, also between blocks that are in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
