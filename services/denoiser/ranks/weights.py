"""The weights of a network that is on the ranks of a group."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress

from safelight.errors import ModelRestartingError
from services.denoiser.ranks.commands import Leave
from services.denoiser.ranks.group import RankGroup
from services.modeling.weight_streaming import WeightAccount


class RankedWeights:
    """Those of all ranks together.

    Args:
        group: has them.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self.account = WeightAccount(group.loaded.resident_bytes)

    def leave(self) -> None:
        """There is no work: what need not stay on the devices leaves them; ranks that are lost hold nothing."""
        with suppress(ModelRestartingError):
            self.account.take(sum(self._group.call(Leave())) - self.account.resident_bytes)

    def at_home(self) -> AbstractContextManager[None]:
        """They are, in their processes."""
        return nullcontext()
