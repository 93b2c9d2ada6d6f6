"""Which deadlines to give up when not all can be met, so that as few as possible are lost. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

from services.denoiser.step_order import Standing
from services.denoiser.step_work import Request, StepWork


def promised(standings: Iterable[Standing[Request]]) -> list[Standing[Request]]:
    """The requests whose deadlines can be met, the earliest first."""
    possible = [standing for standing in standings if standing.deadline < math.inf and not standing.is_hopeless]
    return sorted(possible, key=lambda standing: standing.deadline)


def given_up(
    by_deadline: Iterable[Standing[Request]], now: float, work_seconds: Callable[[Standing[Request]], float | None]
) -> set[StepWork[Request]]:
    """The requests that would miss their deadlines if the others are to meet theirs.

    Moore and Hodgson's rule: the work is laid out by deadline, and where it does not fit, the longest so far is given
    up. That is what keeps an overload from making everybody late.

    Args:
        by_deadline: requests with a deadline, the earliest first.
        work_seconds: of the device that a request takes until its end; None if it can't be in time at all.
    """
    lost: set[StepWork[Request]] = set()
    kept: list[tuple[float, int, StepWork[Request]]] = []
    end = now
    for position, standing in enumerate(by_deadline):
        seconds = work_seconds(standing)
        if seconds is None:
            lost.add(standing.work)
            continue
        heapq.heappush(kept, (-seconds, position, standing.work))
        end += seconds
        if end > standing.deadline:
            longest, _, work = heapq.heappop(kept)
            end += longest
            lost.add(work)
    return lost
