"""Who goes first: deadlines, then fair shares of the tenants, then priorities, then age. Pure.

1. Urgent: requests whose deadline is near and can still be met, the earliest deadline first. A tenant is heard so only
   while it is not ahead of its share by more than this request, so tight deadlines move work forward and earn no more
   of it.
2. The others, tenant by tenant as their shares allow; within a tenant the higher priority, then the earlier due time.
   A request without a deadline is due three times its own duration after its arrival: the oldest first, but a short one
   overtakes a long one. Deadlines that are given up to save others (`deadlines.py`) are among these.
3. Hopeless: requests that would miss their deadline though they ran by themselves from now on. They fill rows that
   nobody else wants, and so drag nobody down with them.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic

from services.denoiser.cost_curve import StepCosts
from services.denoiser.fair_share import FairShare
from services.denoiser.step_work import FAIR_STRETCH, Request, StepWork

# A request is pressed when it must be in nearly every pass from now on to be in time.
_PRESSED = 1.1


@dataclass(frozen=True)
class Standing(Generic[Request]):
    """A request as seen at one moment.

    Args:
        work: the request.
        step_seconds: of one of its steps by itself.
        due: its deadline, or the time by which it would have been served well.
        pace: seconds that each of its remaining steps may take if it is to be ready when due.
    """

    work: StepWork[Request]
    step_seconds: float
    due: float
    pace: float

    @classmethod
    def of(cls, work: StepWork[Request], costs: StepCosts, now: float) -> Standing[Request]:
        """Where the request stands now."""
        due = work.due(costs)
        return cls(work, work.step_seconds(costs), due, (due - now) / work.left)

    @property
    def has_deadline(self) -> bool:
        return self.work.needs.deadline is not None

    @property
    def is_hopeless(self) -> bool:
        return self.has_deadline and self.pace < self.step_seconds

    @property
    def is_overdue(self) -> bool:
        """It was not served well, and nothing else will end its wait."""
        return not self.has_deadline and self.pace < 0

    def is_urgent(self, shares: FairShare) -> bool:
        """Whether it goes before the tenants' shares are looked at."""
        near = self.has_deadline and self.step_seconds <= self.pace <= FAIR_STRETCH * self.step_seconds
        return near and shares.lead_seconds(self.work.needs.tenant) <= self.work.needs.steps * self.step_seconds


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
    urgent: list[Standing[Request]] = []
    others: list[Standing[Request]] = []
    hopeless: list[Standing[Request]] = []
    for standing in standings:
        is_urgent = standing.work not in lost and standing.is_urgent(shares)
        where = hopeless if standing.is_hopeless else urgent if is_urgent else others
        where.append(standing)
    urgent.sort(key=lambda standing: standing.due)
    others.sort(key=lambda standing: _rank(standing, shared_pass[standing.work.needs.batch_key]))
    hopeless.sort(key=lambda standing: standing.due)
    return [*urgent, *_by_share(others, urgent, shares), *hopeless]


def _rank(standing: Standing[Request], shared_pass: float) -> tuple[int, bool, bool, float]:
    """Sorts the requests of a tenant.

    Those that are pressed come first. Of those that are not, and have no deadline, the one with the most steps left
    does where passes are shared, since it decides how many passes there will be.
    """
    is_pressed = standing.pace < _PRESSED * shared_pass
    is_shared = shared_pass > standing.step_seconds
    by_length = is_shared and not is_pressed and not standing.has_deadline
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
