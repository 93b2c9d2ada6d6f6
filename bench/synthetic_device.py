"""A device that computes nothing and takes its time by a curve, and the clock that drives a scheduling policy on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from bench.arrival_traces import Arrival

DeviceCurve = Callable[[int], float]

# Step time of a published measurement (FLUX on an H200 at 512x512) by batch, in steps of batch 1.
_PUBLISHED = ((1, 1.00), (2, 1.10), (3, 1.12), (4, 1.44), (8, 2.55), (16, 4.99))


def published_curve(rows: int) -> float:
    """Time of a pass by its rows: as measured, linear between the measured sizes and beyond them."""
    for (low, low_time), (high, high_time) in pairwise(_PUBLISHED):
        if rows <= high:
            return low_time + (high_time - low_time) * (rows - low) / (high - low)
    return _PUBLISHED[-1][1] * rows / _PUBLISHED[-1][0]


def linear_curve(rows: int) -> float:
    """A compute-bound device: a row costs what it costs."""
    return float(rows)


class SchedulingPolicy(Protocol):
    """Decides what the device does next."""

    def add(self, arrival: Arrival, now: float) -> None:
        """A request has arrived."""
        ...

    def next_batch(self, now: float) -> Sequence[Arrival]:
        """The requests that take their next step together; empty when idle."""
        ...

    def expire(self, now: float) -> Sequence[Arrival]:
        """The requests that leave because their deadline has passed."""
        ...

    def stepped(self, batch: Sequence[Arrival], time: float) -> None:
        """They have."""
        ...


@dataclass(frozen=True)
class Run:
    """What happened.

    Args:
        trace: the requests.
        finished: when each ended, by its number.
        passes: forward passes in all.
        end: when the last one ended.
    """

    trace: Sequence[Arrival]
    finished: dict[int, float]
    passes: int
    end: float

    @property
    def throughput(self) -> float:
        """Requests a unit of time, over the run."""
        return len(self.trace) / self.end


def simulate(policy: SchedulingPolicy, curve: DeviceCurve, trace: Sequence[Arrival], clients: int | None = None) -> Run:
    """Run a trace to its end.

    Args:
        clients: closed loop: so many requests are there at any time, and the next arrives when one has ended, whatever
            the trace says of its time. None: they arrive as the trace says.
    """
    left = {arrival.number: arrival.steps for arrival in trace}
    finished: dict[int, float] = {}
    now, passes, arrived = 0.0, 0, 0
    ended = 0
    while ended < len(trace):
        while arrived < len(trace) and _is_there(trace[arrived], now, arrived - ended, clients):
            policy.add(trace[arrived], now)
            arrived += 1
        ended += len(policy.expire(now))
        batch = policy.next_batch(now)
        if not batch:
            now = trace[arrived].time if arrived < len(trace) else now
            continue
        time = curve(sum(arrival.rows for arrival in batch))
        now, passes = now + time, passes + 1
        policy.stepped(batch, time)
        for arrival in batch:
            left[arrival.number] -= 1
            if left[arrival.number] == 0:
                finished[arrival.number] = now
                ended += 1
    return Run(trace, finished, passes, now)


def _is_there(arrival: Arrival, now: float, in_flight: int, clients: int | None) -> bool:
    return arrival.time <= now if clients is None else in_flight < clients
