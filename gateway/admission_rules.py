"""Which estimates are good enough to let a request in, and with how many steps. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.estimate import Estimate


@dataclass(frozen=True)
class AdmissionRules:
    """When a request is let in.

    Args:
        max_queue_seconds: most seconds of work ahead of a request in any stage, its own steps included; half of that is
            open to every request, however long it takes itself.
        deadline_factor: a request is refused when its estimate is beyond the time it has times this.
    """

    max_queue_seconds: float
    deadline_factor: float

    def fits(self, estimate: Estimate, remaining_seconds: float | None) -> bool:
        """Whether a request is let in."""
        return self.in_time(estimate.total_seconds, remaining_seconds) and self.full_stage(estimate) is None

    def in_time(self, seconds: float, remaining_seconds: float | None) -> bool:
        """Whether what takes so long will be done in the time it has."""
        return remaining_seconds is None or seconds <= remaining_seconds * self.deadline_factor

    def full_stage(self, estimate: Estimate) -> str | None:
        """The first stage with too much work ahead of the request."""
        over = (stage for stage, time in estimate.stages.items() if time.ahead > self.room(estimate, stage))
        return next(over, None)

    def room(self, estimate: Estimate, stage: str) -> float:
        """Most seconds of work that may be ahead of the request in a stage."""
        half = self.max_queue_seconds / 2
        return max(self.max_queue_seconds - estimate.stages[stage].alone, half)


def most_steps(fewest: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number of steps that fits; None: not even the fewest do. If some fit, so do all that are fewer."""
    if not fits(fewest):
        return None
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if fits(middle) else (fewest, middle - 1)
    return fewest
