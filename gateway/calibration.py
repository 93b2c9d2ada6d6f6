"""How much longer requests really take than the stages' measurements say. Pure, over a clock that is given.

An estimate leaves out transfers, the writing of files, and the work that comes after it was made and takes its turns
too. What that amounts to is seen in the requests of the last minute.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

# No longer: if so many requests are refused that none is measured, the estimates count again as they are.
_WINDOW_SECONDS = 60.0
_SAMPLES = 32


class Calibration:
    """Learns what to add to estimates.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: deque[_Seen] = deque(maxlen=_SAMPLES)

    def note(self, estimated_seconds: float, real_seconds: float) -> None:
        """A request is done."""
        excess = max(real_seconds - estimated_seconds, 0.0)
        self._seen.append(_Seen(self._clock(), excess, excess / estimated_seconds))

    def extra_seconds(self, estimated_seconds: float) -> float:
        """What to add to an estimate: the median of the last requests, in seconds or as a part, whichever is less.

        So a long request does not pay for what is a large part of short ones, nor a short one for long ones; and none
        is taken to be more than twice as long as its estimate.
        """
        oldest = self._clock() - _WINDOW_SECONDS
        seen = [each for each in self._seen if each.at >= oldest]
        if not seen:
            return 0.0
        part = min(statistics.median(each.part for each in seen), 1.0)
        return min(statistics.median(each.seconds for each in seen), part * estimated_seconds)


class _Seen(NamedTuple):
    """By how much a request took longer than estimated: in seconds, and as a part of the estimate."""

    at: float
    seconds: float
    part: float
