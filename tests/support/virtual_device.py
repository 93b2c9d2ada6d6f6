"""A step scheduler on a device that only takes virtual time: no clock, no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from bench.synthetic_device import DeviceCurve, published_curve
from services.denoiser.cost_curve import StepCosts
from services.denoiser.scheduler import SchedulerLimits, StepNeeds, StepScheduler

KEY = "latents"


class VirtualDevice:
    """Runs what the scheduler says.

    Args:
        curve: seconds of a pass by its rows.
        max_rows: rows of a pass.
        max_running: see SchedulerLimits.
        weights: of tenants.
        costs: what the scheduler knows of the curve at the start; None: all of it.
    """

    def __init__(
        self,
        curve: DeviceCurve = published_curve,
        max_rows: int = 8,
        max_running: int = 64,
        weights: Mapping[str, float] | None = None,
        costs: StepCosts | None = None,
    ) -> None:
        self.costs = known(curve, range(1, max_rows + 1)) if costs is None else costs
        self.scheduler = StepScheduler[str](SchedulerLimits(max_running, max_rows, 1000), self.costs, weights)
        self.curve = curve
        self.now = 0.0
        self.passes = 0
        self.needs: dict[str, StepNeeds[str]] = {}
        self.steps_done: Counter[str] = Counter()
        self.took: dict[str, float] = {}
        self._arrived: dict[str, float] = {}
        self.tenant_seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, steps: int = 10, rows: int = 1, key: Hashable = KEY, **more: Any) -> None:
        """A request arrives now; `more` as in StepNeeds."""
        self.needs[name] = StepNeeds(name, key, rows, steps, **more)
        self._arrived[name] = self.now
        self.scheduler.add(self.needs[name], self.now)

    def step(self) -> list[str]:
        """One forward pass; returns who was in it."""
        batch = self.scheduler.next_batch(self.now)
        if not batch:
            return batch
        rows = sum(self.needs[name].rows for name in batch)
        alone = self.needs[batch[0]].alone
        seconds = rows * self.curve(1) if alone else self.curve(rows)
        self.now += seconds
        self.passes += 1
        self.scheduler.stepped(batch, seconds)
        for name in batch:
            needs = self.needs[name]
            self.tenant_seconds[needs.tenant] += seconds * needs.rows / rows
            self.steps_done[name] += 1
            if self.steps_done[name] == needs.steps:
                self.took[name] = self.now - self._arrived[name]
        return batch

    def run(self, passes: int = 10_000) -> None:
        """Passes until nothing is left, so many at most."""
        for _ in range(passes):
            if not self.step():
                return

    def solo_seconds(self, name: str) -> float:
        """What the request takes when it is by itself."""
        needs = self.needs[name]
        return needs.steps * (needs.rows * self.curve(1) if needs.alone else self.curve(needs.rows))

    def stretch(self, name: str) -> float:
        """How many times as long as that it took."""
        return self.took[name] / self.solo_seconds(name)


def known(curve: DeviceCurve, sizes: Iterable[int], key: Hashable = KEY) -> StepCosts:
    """A cost curve that has been measured at these sizes."""
    costs = StepCosts()
    for rows in sizes:
        for _ in range(3):
            costs.record(key, rows, curve(rows))
    return costs
