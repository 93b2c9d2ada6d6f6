"""A conditioning that the ranks have prepared, as the service holds it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.denoiser.ranks.ranks import Ranks


@dataclass(eq=False)
class PreparedOnRanks:
    """They keep it for as long as this is held.

    Args:
        ranks: that have it; others do not.
        number: they know it by.
        batch_key: see `Denoiser.batch_key`.
    """

    ranks: Ranks
    number: int
    batch_key: Hashable = None
