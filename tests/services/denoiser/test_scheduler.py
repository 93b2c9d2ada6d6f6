"""Laws of the step scheduler: short requests are not held up, shares are fair, deadlines are kept, nobody starves."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bench.synthetic_device import DeviceCurve, linear_curve, published_curve
from services.denoiser.cost_curve import StepCosts
from services.denoiser.scheduler import SchedulerLimits, StepNeeds, StepScheduler
from tests.support.virtual_device import VirtualDevice

CURVES = pytest.mark.parametrize("curve", [published_curve, linear_curve])
# Steps of 8 requests, of which every other one has guidance, and three samplers are no concern of the scheduler.
MIXED = (4, 8, 10, 15, 20, 25, 30, 50)


def scheduler(max_running: int = 4, max_batch_rows: int = 4, capacity: int = 2) -> StepScheduler[str]:
    return StepScheduler[str](SchedulerLimits(max_running, max_batch_rows, capacity), StepCosts())


def add(to: StepScheduler[str], names: str, steps: int = 10) -> list[int]:
    """Adds one request for each letter; gives their positions."""
    return [to.add(StepNeeds(name, "sd15", 1, steps), 0.0) for name in names]


def test_an_idle_scheduler_has_no_batch() -> None:
    assert scheduler().next_batch(0.0) == []


def test_a_request_runs_from_its_first_step_and_leaves_with_its_last() -> None:
    steps = scheduler()
    assert add(steps, "a", steps=2) == [0]
    assert (steps.waiting, steps.running) == (1, 0)
    steps.stepped(steps.next_batch(0.0), 1.0)
    assert (steps.waiting, steps.running) == (0, 1)
    steps.stepped(steps.next_batch(1.0), 1.0)
    assert (steps.waiting, steps.running) == (0, 0)
    assert steps.next_batch(2.0) == []


def test_it_is_full_when_as_many_wait_as_may() -> None:
    steps = scheduler(max_running=1, capacity=2)
    assert [(steps.is_full, add(steps, name)) for name in "abc"] == [(False, [0]), (False, [1]), (False, [2])]
    assert steps.is_full
    steps.remove("b")
    assert not steps.is_full


def test_without_a_queue_it_is_full_when_all_run() -> None:
    steps = scheduler(max_running=1, capacity=0)
    assert not steps.is_full
    add(steps, "a")
    assert steps.is_full


def test_a_removed_request_takes_no_further_step() -> None:
    steps = scheduler()
    add(steps, "ab")
    steps.remove("a")
    steps.remove("a")
    steps.remove("unknown")
    assert steps.next_batch(0.0) == ["b"]


def test_a_request_may_go_during_its_step() -> None:
    steps = scheduler()
    add(steps, "a")
    batch = steps.next_batch(0.0)
    steps.remove("a")
    steps.stepped(batch, 1.0)
    assert (steps.waiting, steps.running) == (0, 0)


def test_a_step_that_failed_is_just_not_reported() -> None:
    steps = scheduler()
    add(steps, "ab")
    for name in steps.next_batch(0.0):
        steps.remove(name)
    assert all(steps.next_batch(0.0) for _ in range(steps.waiting))


def test_only_the_batch_that_was_given_can_have_stepped() -> None:
    steps = scheduler()
    add(steps, "ab")
    steps.next_batch(0.0)
    with pytest.raises(ValueError, match="not that of the last"):
        steps.stepped(["c"], 1.0)


def test_a_request_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="without a step"):
        add(scheduler(), "a", steps=0)


@CURVES
@pytest.mark.parametrize("alone", [False, True])
def test_a_short_request_during_a_long_one_takes_at_most_three_times_its_own_time(
    curve: DeviceCurve, alone: bool
) -> None:
    device = VirtualDevice(curve=curve)
    device.add("long", steps=50, alone=alone)
    device.run(passes=10)
    device.add("short", steps=4, alone=alone)
    device.run()
    assert device.stretch("short") <= 3.0
    assert device.took["short"] < device.took["long"]


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("max_rows", [8, 16])
def test_mixed_requests_take_few_more_passes_than_the_best_possible(measured: bool, offset: int, max_rows: int) -> None:
    device = VirtualDevice(max_rows=max_rows, costs=None if measured else StepCosts())
    for number in range(8):
        device.add(str(number), steps=MIXED[(number + offset) % 8], rows=1 + number % 2)
    row_steps = sum(needs.steps * needs.rows for needs in device.needs.values())
    device.run()
    assert device.passes <= 1.15 * max(*MIXED, math.ceil(row_steps / max_rows))


@CURVES
def test_requests_alike_end_in_order_of_arrival(curve: DeviceCurve) -> None:
    device = VirtualDevice(curve=curve, max_rows=2)
    for number in range(6):
        device.add(str(number), steps=5)
        device.step()
    device.run()
    assert list(device.took) == ["0", "1", "2", "3", "4", "5"]


def backlogged(weights: dict[str, float], curve: DeviceCurve = published_curve, **of_b: Any) -> VirtualDevice:
    """Tenant a brings ten requests for each of tenant b's, and the device can't keep up with either."""
    device = VirtualDevice(curve=curve, weights=weights)
    for number in range(60):
        for each in range(10):
            device.add(f"a{number}.{each}", steps=(4, 50)[each % 2], tenant="a")
        device.add(f"b{number}", steps=50, tenant="b", **of_b)
        device.step()
    return device


@CURVES
def test_tenants_of_equal_weight_get_equal_shares_whatever_they_bring(curve: DeviceCurve) -> None:
    device = backlogged({}, curve)
    assert device.tenant_seconds["a"] / device.tenant_seconds["b"] == pytest.approx(1.0, rel=0.1)


@CURVES
def test_shares_follow_the_weights(curve: DeviceCurve) -> None:
    device = backlogged({"b": 2.0}, curve)
    assert device.tenant_seconds["b"] / device.tenant_seconds["a"] == pytest.approx(2.0, rel=0.1)


@CURVES
def test_rows_of_guidance_count(curve: DeviceCurve) -> None:
    device = backlogged({}, curve, rows=2)
    assert device.tenant_seconds["a"] / device.tenant_seconds["b"] == pytest.approx(1.0, rel=0.1)


def test_rows_that_deadlines_took_count_in_the_same_pass() -> None:
    device = VirtualDevice(max_rows=4)
    for name in "abc":
        device.add(f"urgent {name}", steps=20, tenant="hasty", deadline=50.0)
        device.add(f"patient {name}", steps=20, tenant="patient")
        device.add(f"calm {name}", steps=20, tenant="hasty")
    assert not any(name.startswith("calm") for _ in range(10) for name in device.step())


def test_requests_that_run_alone_count() -> None:
    device = backlogged({}, alone=True)
    assert device.tenant_seconds["a"] / device.tenant_seconds["b"] == pytest.approx(1.0, rel=0.1)


@CURVES
def test_tight_deadlines_earn_no_larger_share(curve: DeviceCurve) -> None:
    device = VirtualDevice(curve=curve)
    for number in range(100):
        device.add(f"patient{number}", steps=20, tenant="patient")
        device.add(f"hasty{number}", steps=20, tenant="hasty", deadline=device.now + 55.0)
        device.step()
        for name in [name for name, needs in device.needs.items() if (needs.deadline or math.inf) <= device.now]:
            device.scheduler.remove(name)
    one_request = 20 * published_curve(1)
    assert device.tenant_seconds["hasty"] - device.tenant_seconds["patient"] <= one_request + device.curve(8)


def test_a_priority_goes_first_within_its_tenant_only() -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("mine", steps=10, tenant="a")
    device.add("mine, soon", steps=10, tenant="a", priority=50)
    device.add("another's", steps=10, tenant="b")
    device.run()
    assert device.took["mine, soon"] < device.took["mine"]
    assert device.took["another's"] <= device.took["mine, soon"] + 1.0


def test_a_deadline_goes_before_work_that_has_none() -> None:
    device = VirtualDevice(curve=linear_curve)
    for number in range(5):
        device.add(str(number), steps=4)
    device.add("soon", steps=4, deadline=6.0)
    device.run()
    assert device.took["soon"] <= 6.0


def test_a_deadline_that_is_far_away_does_not_go_first() -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("now", steps=10)
    device.add("overnight", steps=10, deadline=10_000.0)
    device.run()
    assert device.took["now"] < device.took["overnight"]


def test_a_short_request_overtakes_a_long_one_though_both_have_far_deadlines() -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("long", steps=50, deadline=600.0)
    device.run(passes=10)
    device.add("short", steps=4, deadline=device.now + 600.0)
    device.run()
    assert device.stretch("short") <= 3.0


def test_a_request_with_a_far_deadline_does_not_wait_for_it() -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("patient", steps=10, deadline=100_000.0)
    for number in range(300):
        device.add(f"hasty{number}", steps=4, deadline=device.now + 12.0)
        device.run(passes=4)
        if "patient" in device.took:
            break
    assert device.stretch("patient") <= 20.0


def test_deadlines_that_can_all_be_met_are() -> None:
    device = VirtualDevice(curve=linear_curve)
    due = {"a": 30.0, "b": 10.0, "c": 20.0}
    for name, deadline in due.items():
        device.add(name, steps=9, deadline=deadline)
    device.run()
    assert all(device.took[name] <= deadline for name, deadline in due.items())


@pytest.mark.parametrize("alone", [False, True])
def test_a_hopeless_request_drags_nobody_down(alone: bool) -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("hopeless", steps=50, deadline=10.0, alone=alone)
    for number in range(3):
        device.add(str(number), steps=4, deadline=13.0, alone=alone)
    device.run()
    assert all(device.took[str(number)] <= 13.0 for number in range(3))


@pytest.mark.parametrize("alone", [False, True])
def test_in_an_overload_of_deadlines_most_are_met(alone: bool) -> None:
    """All are due at once: no order of the first of them may make all late."""
    device = VirtualDevice(curve=linear_curve)
    for number in range(20):
        device.add(str(number), steps=4, deadline=40.0 + number / 100, alone=alone)
    device.run()
    assert sum(device.took[name] <= needs.deadline for name, needs in device.needs.items() if needs.deadline) == 10


def test_a_request_without_a_deadline_ends_though_deadlines_never_cease() -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("patient", steps=10)
    for number in range(300):
        device.add(f"hasty{number}", steps=4, deadline=device.now + 12.0)
        device.run(passes=4)
        if "patient" in device.took:
            break
    assert device.stretch("patient") <= 20.0


@CURVES
@pytest.mark.parametrize("alone", [False, True])
def test_a_request_that_another_replica_has_lost_takes_its_first_step_here_at_once(
    curve: DeviceCurve, alone: bool
) -> None:
    device = VirtualDevice(curve=curve, max_rows=2)
    for number in range(8):
        device.add(f"there {number}", steps=4, alone=alone, deadline=1000.0, priority=9)
    device.step()
    device.add("new", steps=20, alone=alone)
    device.add("resumed", steps=20, alone=alone, resumed=True)
    assert "resumed" in device.step()
    device.run(passes=8)
    assert device.steps_done["resumed"] == 1


def test_a_low_priority_ends_though_higher_ones_never_cease() -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("low", steps=10)
    for number in range(300):
        device.add(f"high{number}", steps=4, priority=100)
        device.run(passes=4)
        if "low" in device.took:
            break
    assert device.stretch("low") <= 20.0


def test_an_expensive_request_ends_though_cheap_ones_never_cease() -> None:
    device = VirtualDevice(curve=linear_curve)
    device.add("long", steps=50)
    for number in range(400):
        device.add(f"short{number}", steps=4)
        device.run(passes=4)
        if "long" in device.took:
            break
    assert device.stretch("long") <= 20.0


def test_started_requests_beyond_the_limit_may_leave_the_device_once() -> None:
    device = VirtualDevice(curve=linear_curve, max_running=1)
    device.add("long", steps=50)
    device.step()
    assert device.scheduler.to_spill() == []
    device.add("short", steps=4)
    assert device.step() == ["short"]
    assert device.scheduler.to_spill() == ["long"]
    assert device.scheduler.to_spill() == []


def test_a_request_that_came_back_may_be_spilled_again() -> None:
    device = VirtualDevice(curve=linear_curve, max_running=1)
    device.add("long", steps=50)
    device.step()
    spilled: Counter[str] = Counter()
    for number in range(3):
        device.add(f"short{number}", steps=4)
        for _ in range(6):
            device.step()
            spilled.update(device.scheduler.to_spill())
    assert spilled["long"] == 3


class AnySequence(RuleBasedStateMachine):
    """The laws that hold after any sequence of arrivals, steps and departures."""

    max_running, max_rows, capacity = 2, 4, 6

    def __init__(self) -> None:
        super().__init__()
        limits = SchedulerLimits(self.max_running, self.max_rows, self.capacity)
        # The twin is told the same and must do the same.
        self.schedulers = [StepScheduler[int](limits, StepCosts(), {"a": 2.0}) for _ in range(2)]
        self.arrived = 0
        self.now = 0.0
        self.present: dict[int, StepNeeds[int]] = {}
        self.left: dict[int, int] = {}
        self.started: set[int] = set()

    @precondition(lambda self: not self.schedulers[0].is_full)
    @rule(
        key=st.sampled_from(["small", "large"]),
        rows=st.integers(1, 6),
        steps=st.integers(1, 5),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.integers(-2, 2),
        patience=st.none() | st.floats(0.0, 50.0),
        alone=st.booleans(),
    )
    def arrive(
        self, key: str, rows: int, steps: int, tenant: str, priority: int, patience: float | None, alone: bool
    ) -> None:
        deadline = None if patience is None else self.now + patience
        needs = StepNeeds(self.arrived, key, rows, steps, tenant, priority, deadline, alone)
        for each in self.schedulers:
            assert each.add(needs, self.now) == len(self.present)
        self.arrived += 1
        self.present[needs.request] = needs
        self.left[needs.request] = steps

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.present)))
        self._forget(request)
        for each in self.schedulers:
            each.remove(request)

    @rule(seconds=st.floats(0.001, 20.0))
    def step(self, seconds: float) -> None:
        batch, same = (each.next_batch(self.now) for each in self.schedulers)
        assert batch == same
        assert bool(batch) == bool(self.present)
        needs = [self.present[request] for request in batch]
        assert len(set(batch)) == len(batch)
        assert len({each.batch_key for each in needs}) <= 1
        assert len(batch) <= 1 or sum(each.rows for each in needs) <= self.max_rows
        assert len(batch) <= 1 or not any(each.alone for each in needs)
        self.now += seconds
        if batch:
            for scheduler in self.schedulers:
                scheduler.stepped(batch, seconds)
        for request in batch:
            self.started.add(request)
            self.left[request] -= 1
            if self.left[request] == 0:
                self._forget(request)

    @rule()
    def spill(self) -> None:
        spilled, same = (each.to_spill() for each in self.schedulers)
        assert spilled == same
        assert set(spilled) <= self.started

    @invariant()
    def it_knows_who_is_there(self) -> None:
        scheduler = self.schedulers[0]
        assert scheduler.running == len(self.started)
        assert scheduler.waiting == len(self.present) - len(self.started)
        assert scheduler.is_full == (len(self.present) >= self.max_running + self.capacity)
        assert (scheduler.backlog_seconds() > 0) == bool(self.present)

    def _forget(self, request: int) -> None:
        del self.present[request]
        self.started.discard(request)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
