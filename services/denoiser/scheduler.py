"""Which requests take the next step together: pure, without torch or a clock.

The batch is re-formed before every step. Requests enter in order of arrival, up to `max_running` at a time. Among
these, the one that has waited longest since its last step goes next, and others of its batch key share its forward
pass while rows last. So a short request never waits for a long one to end, and none starves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Request = TypeVar("Request", bound=Hashable)


@dataclass(frozen=True)
class StepNeeds(Generic[Request]):
    """What the scheduler knows of a request.

    Args:
        request: its identity.
        batch_key: requests of equal key (model, latent shape, length of the conditioning) can share a forward pass.
        rows: rows it takes of a forward pass.
    """

    request: Request
    batch_key: Hashable
    rows: int


class StepScheduler(Generic[Request]):
    """Forms the batch of each step.

    Args:
        max_running: requests between their first and last step.
        max_batch_rows: rows of a forward pass; a single request may exceed it alone.
        capacity: requests that may wait beside the running ones.
    """

    def __init__(self, max_running: int, max_batch_rows: int, capacity: int) -> None:
        self._max_running = max_running
        self._max_batch_rows = max_batch_rows
        self._capacity = capacity
        self._waiting: dict[Request, StepNeeds[Request]] = {}
        # Least recently stepped first.
        self._running: dict[Request, StepNeeds[Request]] = {}

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests between their first and last step."""
        return len(self._running)

    @property
    def is_full(self) -> bool:
        """Whether `add` would exceed the capacity."""
        return len(self._running) >= self._max_running and len(self._waiting) >= self._capacity

    def add(self, needs: StepNeeds[Request]) -> int:
        """Take a request in; returns how many were there before it. The caller checks `is_full` first."""
        position = self.waiting + self.running
        self._waiting[needs.request] = needs
        self._start_waiting()
        return position

    def remove(self, request: Request) -> None:
        """Forget a request that is done or cancelled; unknown ones are ignored."""
        self._waiting.pop(request, None)
        self._running.pop(request, None)
        self._start_waiting()

    def next_batch(self) -> list[Request]:
        """The requests of the next forward pass, which then count as the most recently stepped; empty when idle."""
        batch = [needs.request for needs in self._fill(self._running.values())]
        for request in batch:
            self._running[request] = self._running.pop(request)
        return batch

    def _fill(self, candidates: Iterable[StepNeeds[Request]]) -> list[StepNeeds[Request]]:
        batch: list[StepNeeds[Request]] = []
        rows = 0
        for needs in candidates:
            fits = rows + needs.rows <= self._max_batch_rows
            if not batch or (fits and needs.batch_key == batch[0].batch_key):
                batch.append(needs)
                rows += needs.rows
        return batch

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            request = next(iter(self._waiting))
            self._running[request] = self._waiting.pop(request)
