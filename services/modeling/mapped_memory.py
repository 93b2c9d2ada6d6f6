"""Pages of mapped files: given back once a tensor's bytes have been copied elsewhere.

A page of a checkpoint that was read stays in the process's resident set, though the kernel could drop it at any time.
Memory limits of containers count it, so a load that reads the whole file and keeps a converted copy would seem to take
both. The kernel tells which memory is a mapped file; other memory is never touched.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")  # Linux; elsewhere nothing is given back
_MADV_DONTNEED = 4
_MIN_BYTES = 2**19  # the kernel's list of mappings takes a millisecond or two to read, longer than so little to copy


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's bytes, as far as they fill pages, are a mapping of a file."""
    start, stop = _pages(tensor)
    return start < stop and _is_mapped_file(start, stop)


def release_mapped(tensor: Tensor) -> None:
    """Gives back the pages under a tensor's bytes, if they are a mapping of a file, to which nothing was written.

    The tensor may be used on: its bytes are read again from the file then. Less than half a MiB is left alone.
    """
    if tensor.nbytes >= _MIN_BYTES and is_mapped(tensor):
        start, stop = _pages(tensor)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)


def _pages(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first whole page and of what follows its last; the same if there is none."""
    if tensor.device.type != "cpu" or tensor.is_mkldnn:
        return 0, 0
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE


def _is_mapped_file(start: int, stop: int) -> bool:
    if not _MAPS.exists():
        return False
    for line in _MAPS.read_text().splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in span.split("-"))
        if first <= start < last:
            return stop <= last and inode != "0"
    return False
