"""When refused requests are told to come back. Pure, over a clock that is given."""

from __future__ import annotations

from collections.abc import Callable

_SHORTEST_SECONDS = 0.05
_LONGEST_SPREAD_SECONDS = 30.0


class RetryTimes:
    """Spreads the returns at the pace at which work is done, so that those refused together do not return together.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next = 0.0

    def after(self, wait_seconds: float, work_seconds: float) -> float:
        """Seconds after which a refused request should come back.

        Args:
            wait_seconds: until there will be room for one.
            work_seconds: what this one will take of the room, once it is back.
        """
        now = self._clock()
        earliest = now + max(wait_seconds, _SHORTEST_SECONDS)
        turn = min(max(self._next, earliest), earliest + _LONGEST_SPREAD_SECONDS)
        self._next = turn + work_seconds
        return turn - now
