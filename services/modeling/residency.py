"""Which blocks of a network's weights stay on the device and which are streamed through it; pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SLOTS = 2  # room for the block that computes and for the one that comes next


@dataclass(frozen=True, kw_only=True)
class Residency:
    """How much of a network's weights the device holds, and until when.

    Args:
        budget_bytes: most bytes of weights on the device; what is beyond them streams. None: no bound.
        leaves_when_idle: nothing stays on the device while the network has no work.
    """

    budget_bytes: int | None = None
    leaves_when_idle: bool = False


RESIDENT = Residency()
"""Everything on the device, always."""


@dataclass(frozen=True, kw_only=True)
class ResidencyPlan:
    """What becomes of each block, in the order in which they compute.

    Args:
        block_bytes: of each block.
        resident: whether the block stays; the others stream.
    """

    block_bytes: tuple[int, ...]
    resident: tuple[bool, ...]

    @property
    def resident_bytes(self) -> int:
        """Of the blocks that stay."""
        return sum(size for size, stays in zip(self.block_bytes, self.resident, strict=True) if stays)

    @property
    def slot_bytes(self) -> int:
        """Of the largest block that streams."""
        return max((size for size, stays in zip(self.block_bytes, self.resident, strict=True) if not stays), default=0)

    @property
    def slots(self) -> int:
        """Blocks that have room on the device beside those that stay."""
        return min(SLOTS, self.resident.count(False))

    @property
    def peak_bytes(self) -> int:
        """Most bytes that the device ever holds: the budget, or two blocks where it is less than that."""
        return self.resident_bytes + self.slots * self.slot_bytes


def plan_residency(block_bytes: Sequence[int], budget_bytes: int | None) -> ResidencyPlan:
    """As many blocks stay as fit, after room for two that stream.

    Those that stay are spread evenly among the others, so that a copy has several blocks' computation to hide behind.

    Args:
        block_bytes: of each block, in the order in which they compute.
        budget_bytes: most bytes on the device; None: no bound.
    """
    sizes = tuple(block_bytes)
    if budget_bytes is None or sum(sizes) <= budget_bytes:
        return ResidencyPlan(block_bytes=sizes, resident=(True,) * len(sizes))
    room = max(budget_bytes - SLOTS * max(sizes), 0)
    return ResidencyPlan(block_bytes=sizes, resident=_filled(sizes, _spread(sizes, room), room))


def _spread(sizes: Sequence[int], room: int) -> list[bool]:
    """Which blocks stay, so that up to every one of them the same share of the bytes does."""
    total, passed, kept, resident = sum(sizes), 0, 0, []
    for size in sizes:
        passed += size
        stays = (kept + size) * total <= room * passed
        kept += size * stays
        resident.append(stays)
    return resident


def _filled(sizes: Sequence[int], resident: list[bool], room: int) -> tuple[bool, ...]:
    """The same, and the largest of the others that still fit."""
    left = room - sum(size for size, stays in zip(sizes, resident, strict=True) if stays)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if not resident[index] and sizes[index] <= left:
            resident[index] = True
            left -= sizes[index]
    return tuple(resident)
