"""Which requests take the next step together: pure, without torch or a clock.

The batch is re-formed before every step, out of all requests that are there. Who goes first says `step_order.py`, who
shares the pass with it `merging.py`; here is who is there, and how far. A request that does not get the next step keeps
its state, so a long one yields to a short one between two of its steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from services.denoiser.backlog import backlog_seconds
from services.denoiser.cost_curve import StepCosts
from services.denoiser.deadlines import given_up, promised
from services.denoiser.fair_share import FairShare
from services.denoiser.merging import ForwardPass, Merging
from services.denoiser.step_order import Standing, in_order
from services.denoiser.step_work import Request, StepNeeds, StepWork

__all__ = ["SchedulerLimits", "StepNeeds", "StepScheduler"]

# Share of the device for requests that are overdue and have no deadline that would end their wait.
_OVERDUE_SHARE = 1 / 8


@dataclass(frozen=True)
class SchedulerLimits:
    """How much the scheduler takes on.

    Args:
        max_running: started requests that keep their latents on the device.
        max_batch_rows: rows of a forward pass; a single request may exceed it alone.
        capacity: requests that may wait beside the running ones.
    """

    max_running: int
    max_batch_rows: int
    capacity: int


class StepScheduler(Generic[Request]):
    """Forms the batch of each step.

    Args:
        limits: how much it takes on.
        costs: what forward passes cost; `stepped` refines them.
        tenant_weights: shares of tenants under load; others weigh 1.
    """

    def __init__(
        self, limits: SchedulerLimits, costs: StepCosts, tenant_weights: Mapping[str, float] | None = None
    ) -> None:
        self._limits = limits
        self._costs = costs
        self._shares = FairShare(tenant_weights or {})
        self._merging = Merging(costs, limits.max_batch_rows)
        # The least recently stepped first.
        self._works: dict[Request, StepWork[Request]] = {}
        self._pass: ForwardPass[Request] | None = None
        self._overdue_credit = 0.0

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._works) - self.running

    @property
    def running(self) -> int:
        """Requests between their first and last step."""
        return sum(work.started for work in self._works.values())

    @property
    def is_full(self) -> bool:
        """Whether `add` would exceed the capacity."""
        return len(self._works) >= self._limits.max_running + self._limits.capacity

    def add(self, needs: StepNeeds[Request], now: float) -> int:
        """Take a request in; returns how many were there before it. The caller checks `is_full` first.

        Raises:
            ValueError: it has no step to do.
        """
        if needs.steps < 1:
            raise ValueError("a request without a step to do has nothing to be scheduled")
        self._shares.join(needs.tenant)
        self._works[needs.request] = StepWork(needs, now, needs.steps)
        return len(self._works) - 1

    def remove(self, request: Request) -> None:
        """Forget a request that is done or cancelled; unknown ones are ignored."""
        work = self._works.pop(request, None)
        if work is not None:
            self._shares.leave(work.needs.tenant)

    def next_batch(self, now: float) -> list[Request]:
        """The requests of the next forward pass; empty when idle. The caller says `stepped` of them or removes them."""
        if not self._works:
            return []
        self._pass = self._merging.form(self._in_order(now), now)
        for work in self._pass.batch:
            work.started, work.spilled = True, False
            self._works[work.needs.request] = self._works.pop(work.needs.request)
        return [work.needs.request for work in self._pass.batch]

    def stepped(self, batch: Sequence[Request], seconds: float) -> None:
        """The batch of `next_batch` has done its step in so many seconds; requests without a further step are dropped.

        Requests that were removed meanwhile are charged all the same: the device has worked for them.

        Raises:
            ValueError: it is another batch.
        """
        done = self._pass
        if done is None or [work.needs.request for work in done.batch] != list(batch):
            raise ValueError("the batch is not that of the last next_batch")
        self._pass = None
        self._merging.ran(done, seconds)
        self._overdue_credit += _OVERDUE_SHARE * seconds
        for work in done.batch:
            self._shares.charge(work.needs.tenant, seconds * work.needs.rows / done.rows)
            work.left -= 1
            if work.left == 0:
                self.remove(work.needs.request)

    def to_spill(self) -> list[Request]:
        """Started requests whose latents may leave the device: those beyond `max_running`, the longest unstepped first.

        Each is named once; it is back on the device with its next step.
        """
        stepping = () if self._pass is None else self._pass.batch
        on_device = [work for work in self._works.values() if work.started and not work.spilled]
        excess = max(len(on_device) - self._limits.max_running, 0)
        idle = [work for work in on_device if work not in stepping][:excess]
        for work in idle:
            work.spilled = True
        return [work.needs.request for work in idle]

    def backlog_seconds(self) -> float:
        """Seconds of work that is accepted and not yet done, at the batch sizes it would really use."""
        return backlog_seconds(self._works.values(), self._costs, self._limits.max_batch_rows)

    def _in_order(self, now: float) -> list[Standing[Request]]:
        standings = [Standing.of(work, self._costs, now) for work in self._works.values()]
        best_rows = self._best_rows()
        shared_pass = {key: self._costs.seconds(key, rows) for key, rows in best_rows.items()}

        def work_seconds(standing: Standing[Request]) -> float:
            needs = standing.work.needs
            share = shared_pass[needs.batch_key] / best_rows[needs.batch_key]
            return standing.work.left * (standing.step_seconds if needs.alone else needs.rows * share)

        lost = given_up(promised(standings), now, work_seconds)
        return self._overdue_first(in_order(standings, self._shares, shared_pass, lost))

    def _overdue_first(self, ordered: list[Standing[Request]]) -> list[Standing[Request]]:
        """Put the oldest overdue request first when it is its turn."""
        overdue = [standing for standing in ordered if standing.is_overdue]
        if not overdue:
            self._overdue_credit = 0.0
            return ordered
        oldest = min(overdue, key=lambda standing: standing.due)
        if self._overdue_credit < oldest.step_seconds:
            return ordered
        self._overdue_credit = 0.0
        return [oldest, *(standing for standing in ordered if standing is not oldest)]

    def _best_rows(self) -> dict[Hashable, int]:
        """Rows of the best pass that the requests there could fill, by batch key."""
        there: dict[Hashable, int] = {}
        for work in self._works.values():
            there[work.needs.batch_key] = there.get(work.needs.batch_key, 0) + work.needs.rows
        most = self._limits.max_batch_rows
        return {key: self._merging.best_rows(key, range(1, min(rows, most) + 1)) for key, rows in there.items()}
