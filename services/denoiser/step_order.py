"""Who goes first: deadlines, then fair shares of the tenants, then priorities, then age. Pure.

1. The first step here of requests that another replica has lost: they have waited for it already.
2. Urgent: requests whose deadline is near and can still be met, the earliest deadline first. A tenant is heard so only
   while it is not ahead of its share by more than this request, so tight deadlines move work forward and earn no more
   of it.
3. The others, tenant by tenant as their shares allow; within a tenant the higher priority, then the earlier due time.
   A request is due by its deadline, but no later than three times its own duration after its arrival: so the oldest is
   first, but a short one overtakes a long one. Last come those whose deadlines are given up (`deadlines.py`).
4. Hopeless: requests that would miss their deadline though they ran by themselves from now on. They fill rows that
   nobody else wants, and so drag nobody down with them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic

from services.denoiser.cost_curve import StepCosts
from services.denoiser.fair_share import FairShare
from services.denoiser.step_work import Request, StepWork

# A request is served well when it takes no more than three times what it takes by itself.
_FAIR_STRETCH = 3.0
# It is pressed when it must be in nearly every pass from now on to be served well.
_PRESSED = 1.1
# A deadline is far when it leaves this many times what the request takes by itself.
_FAR = 12.0


@dataclass(frozen=True)
class Standing(Generic[Request]):
    """A request as seen at one moment.

    Args:
        work: the request.
        step_seconds: of one of its steps by itself.
        deadline: its deadline, infinite where it has none.
        deadline_pace: seconds that each of its remaining steps may take if it is to meet the deadline.
        due: the deadline, or the time by which it would have been served well if that is sooner.
        pace: seconds that each of its remaining steps may take if it is to be ready when due.
    """

    work: StepWork[Request]
    step_seconds: float
    deadline: float
    deadline_pace: float
    due: float
    pace: float

    @classmethod
    def of(cls, work: StepWork[Request], costs: StepCosts, now: float) -> Standing[Request]:
        """Where the request stands now."""
        step_seconds = work.step_seconds(costs)
        deadline = math.inf if work.needs.deadline is None else work.needs.deadline
        due = min(deadline, work.arrived + _FAIR_STRETCH * work.needs.steps * step_seconds)
        return cls(work, step_seconds, deadline, (deadline - now) / work.left, due, (due - now) / work.left)

    @property
    def is_hopeless(self) -> bool:
        """Its deadline can't be met any more."""
        return self.deadline_pace < self.step_seconds

    @property
    def is_overdue(self) -> bool:
        """It was not served well, and no deadline has ended its wait."""
        return self.pace < 0 and not self.is_hopeless

    @property
    def is_calm(self) -> bool:
        """No deadline is anywhere near."""
        return self.deadline_pace > _FAR * self.step_seconds

    def is_urgent(self, shares: FairShare) -> bool:
        """Whether it goes before the tenants' shares are looked at."""
        is_near = self.step_seconds <= self.deadline_pace <= _FAIR_STRETCH * self.step_seconds
        return is_near and shares.lead_seconds(self.work.needs.tenant) <= self.work.needs.steps * self.step_seconds


def in_order(
    standings: Iterable[Standing[Request]],
    shares: FairShare,
    shared_pass: Mapping[Hashable, float],
    lost: Collection[StepWork[Request]],
) -> list[Standing[Request]]:
    """All requests, the first to be served first.

    Args:
        shared_pass: seconds of a well filled pass, by batch key.
        lost: requests whose deadlines have been given up.
    """
    interrupted: list[Standing[Request]] = []
    urgent: list[Standing[Request]] = []
    others: list[Standing[Request]] = []
    hopeless: list[Standing[Request]] = []
    for standing in standings:
        if standing.work.is_interrupted:
            interrupted.append(standing)
        elif standing.is_hopeless:
            hopeless.append(standing)
        elif standing.work not in lost and standing.is_urgent(shares):
            urgent.append(standing)
        else:
            others.append(standing)
    urgent.sort(key=lambda standing: standing.deadline)
    others.sort(key=lambda each: (each.work in lost, *_rank(each, shared_pass[each.work.needs.batch_key])))
    hopeless.sort(key=lambda standing: standing.deadline)
    first = interrupted + urgent
    return [*first, *_by_share(others, first, shares), *hopeless]


def _rank(standing: Standing[Request], shared_pass: float) -> tuple[int, bool, bool, float]:
    """Sorts the requests of a tenant.

    Those that are pressed come first. Of those that are calm, the one with the most steps left does where passes are
    shared, since it decides how many passes there will be.
    """
    is_pressed = standing.pace < _PRESSED * shared_pass
    is_shared = shared_pass > standing.step_seconds
    by_length = is_shared and not is_pressed and standing.is_calm
    order = -standing.work.left if by_length else standing.due
    return (-standing.work.needs.priority, not is_pressed, by_length, order)


def _by_share(
    standings: Iterable[Standing[Request]], served: Iterable[Standing[Request]], shares: FairShare
) -> Iterator[Standing[Request]]:
    """Merges the tenants' queues so that each next request is of the tenant that has had least, `served` counted."""
    queues: dict[str, list[Standing[Request]]] = {}
    for standing in standings:
        queues.setdefault(standing.work.needs.tenant, []).append(standing)
    times = shares.virtual_times()
    for standing in served:
        times[standing.work.needs.tenant] += _cost(standing, shares)
    heads = [(times[tenant], tenant, 0) for tenant in queues]
    heapq.heapify(heads)
    while heads:
        time, tenant, position = heapq.heappop(heads)
        standing = queues[tenant][position]
        yield standing
        if position + 1 < len(queues[tenant]):
            heapq.heappush(heads, (time + _cost(standing, shares), tenant, position + 1))


def _cost(standing: Standing[Request], shares: FairShare) -> float:
    return shares.cost(standing.work.needs.tenant, standing.step_seconds)
