"""Running out of memory, the same on every kind of device."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the host had no memory left; a CPU allocation fails as a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
