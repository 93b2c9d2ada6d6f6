"""Parts of a tensor, one on each rank, joined on all of them."""

from __future__ import annotations

from torch import Tensor, distributed

from services.modeling.parallel.mesh import Axis

# Its name since torch 2.13, and the one before.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


def all_gather(whole: Tensor, part: Tensor, axis: Axis) -> None:
    """Writes the ranks' parts, in their order, into contiguous memory."""
    _all_gather(whole, part, group=axis.group)
