"""Three ways to share a device: our step scheduler, one request at a time, and a batcher that merges only equals."""

from __future__ import annotations

from collections.abc import Sequence

from bench.arrival_traces import Arrival
from bench.synthetic_device import DeviceCurve
from services.denoiser.cost_curve import StepCosts
from services.denoiser.scheduler import SchedulerLimits, StepNeeds, StepScheduler

MAX_ROWS = 16


class StepSchedulerPolicy:
    """Ours, with no measurement to start from.

    Args:
        curve: the device's, by which deadlines are set.
        deadline_stretch: a request's deadline, in multiples of what it takes by itself; None: no deadlines.
    """

    def __init__(self, curve: DeviceCurve, deadline_stretch: float | None) -> None:
        limits = SchedulerLimits(max_running=MAX_ROWS, max_batch_rows=MAX_ROWS, capacity=1_000_000)
        self.costs = StepCosts()
        self._scheduler = StepScheduler[Arrival](limits, self.costs)
        self._curve = curve
        self._stretch = deadline_stretch
        self._deadlines: dict[Arrival, float] = {}
        self._left: dict[Arrival, int] = {}

    def add(self, arrival: Arrival, now: float) -> None:
        solo = arrival.steps * self._curve(arrival.rows)
        deadline = None if self._stretch is None else now + self._stretch * solo
        self._left[arrival] = arrival.steps
        if deadline is not None:
            self._deadlines[arrival] = deadline
        self._scheduler.add(StepNeeds(arrival, "latents", arrival.rows, arrival.steps, deadline=deadline), now)

    def expire(self, now: float) -> Sequence[Arrival]:
        gone = [arrival for arrival, deadline in self._deadlines.items() if deadline <= now]
        for arrival in gone:
            self._scheduler.remove(arrival)
            del self._deadlines[arrival]
        return gone

    def next_batch(self, now: float) -> Sequence[Arrival]:
        return self._scheduler.next_batch(now)

    def stepped(self, batch: Sequence[Arrival], time: float) -> None:
        self._scheduler.stepped(batch, time)
        for arrival in batch:
            self._left[arrival] -= 1
            if not self._left[arrival]:
                self._deadlines.pop(arrival, None)


class EqualKeyBatcher:
    """First in, first out: the oldest request and whatever waits with an equal key, all their steps to the end.

    Args:
        max_rows: rows of a pass; with 1, or the rows of any request, it serves one request at a time.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._queue: list[Arrival] = []
        self._batch: list[Arrival] = []
        self._left = 0

    def add(self, arrival: Arrival, now: float) -> None:
        self._queue.append(arrival)

    def expire(self, now: float) -> Sequence[Arrival]:
        return ()

    def next_batch(self, now: float) -> Sequence[Arrival]:
        if not self._left and self._queue:
            self._start()
        return self._batch if self._left else ()

    def stepped(self, batch: Sequence[Arrival], time: float) -> None:
        self._left -= 1

    def _start(self) -> None:
        first = self._queue[0]
        equals = [arrival for arrival in self._queue if arrival.equal_key == first.equal_key]
        self._batch = equals[: max(self._max_rows // first.rows, 1)]
        self._left = first.steps
        taken = set(self._batch)
        self._queue = [arrival for arrival in self._queue if arrival not in taken]
