"""Which deadlines to give up when not all can be met, so that as few as possible are lost. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from services.denoiser.step_order import Standing
from services.denoiser.step_work import Request, StepWork


def given_up(
    standings: Iterable[Standing[Request]], now: float, work_seconds: Callable[[Standing[Request]], float | None]
) -> set[StepWork[Request]]:
    """The requests that would miss their deadlines if the others are to meet theirs.

    Moore and Hodgson's rule: the work is laid out by deadline, and where it does not fit, the longest so far is given
    up. That is what keeps an overload from making everybody late.

    Args:
        standings: requests; those without a deadline, and those that are hopeless anyhow, are left out.
        work_seconds: of the device that a request takes until its end; None if it can't be in time at all.
    """
    lost: set[StepWork[Request]] = set()
    kept: list[tuple[float, int, StepWork[Request]]] = []
    end = now
    promised = [standing for standing in standings if standing.has_deadline and not standing.is_hopeless]
    for position, standing in enumerate(sorted(promised, key=lambda each: each.due)):
        seconds = work_seconds(standing)
        if seconds is None:
            lost.add(standing.work)
            continue
        heapq.heappush(kept, (-seconds, position, standing.work))
        end += seconds
        if end > standing.due:
            longest, _, work = heapq.heappop(kept)
            end += longest
            lost.add(work)
    return lost
