"""Laws of the step scheduler: first come first started, nobody starves, and equal keys share a forward pass."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.denoiser.scheduler import StepNeeds, StepScheduler


def scheduler(max_running: int = 4, max_batch_rows: int = 4, capacity: int = 2) -> StepScheduler[str]:
    return StepScheduler[str](max_running, max_batch_rows, capacity)


def add(to: StepScheduler[str], names: str, key: Hashable = "sd15", rows: int = 1) -> list[int]:
    """Adds one request for each letter; gives their positions."""
    return [to.add(StepNeeds(name, key, rows)) for name in names]


def test_an_idle_scheduler_has_no_batch() -> None:
    assert scheduler().next_batch() == []


def test_requests_of_one_key_share_a_batch() -> None:
    steps = scheduler()
    add(steps, "abc")
    assert steps.next_batch() == ["a", "b", "c"]


def test_a_batch_has_no_more_rows_than_the_limit() -> None:
    steps = scheduler(max_batch_rows=5)
    add(steps, "abc", rows=2)
    assert [steps.next_batch() for _ in range(3)] == [["a", "b"], ["c", "a"], ["b", "c"]]


def test_a_smaller_request_fills_the_rows_that_a_larger_one_leaves() -> None:
    steps = scheduler(max_batch_rows=3)
    add(steps, "ab", rows=2)
    add(steps, "c", rows=1)
    assert [steps.next_batch() for _ in range(2)] == [["a", "c"], ["b", "c"]]


def test_requests_of_different_keys_take_turns() -> None:
    steps = scheduler()
    add(steps, "ab", "small")
    add(steps, "c", "large")
    assert [steps.next_batch() for _ in range(3)] == [["a", "b"], ["c"], ["a", "b"]]


def test_a_request_with_more_rows_than_the_limit_runs_alone() -> None:
    steps = scheduler(max_batch_rows=2)
    add(steps, "a")
    add(steps, "B", rows=3)
    add(steps, "c")
    assert [steps.next_batch() for _ in range(3)] == [["a", "c"], ["B"], ["a", "c"]]


def test_requests_start_in_order_of_arrival_as_others_end() -> None:
    steps = scheduler(max_running=2)
    assert add(steps, "abcd") == [0, 1, 2, 3]
    assert (steps.running, steps.waiting) == (2, 2)
    assert sorted(steps.next_batch()) == ["a", "b"]
    steps.remove("a")
    assert sorted(steps.next_batch()) == ["b", "c"]


def test_it_is_full_when_as_many_wait_as_may() -> None:
    steps = scheduler(max_running=1, capacity=2)
    assert [steps.is_full for _ in add(steps, "ab")] == [False, False]
    add(steps, "c")
    assert steps.is_full
    steps.remove("b")
    assert not steps.is_full


def test_without_a_queue_it_is_full_when_all_run() -> None:
    steps = scheduler(max_running=1, capacity=0)
    assert not steps.is_full
    add(steps, "a")
    assert steps.is_full


@pytest.mark.parametrize("gone", ["running", "waiting", "unknown", "twice"])
def test_a_request_is_forgotten_in_every_state(gone: str) -> None:
    steps = scheduler(max_running=1, capacity=4)
    add(steps, "ab")
    removed = {"running": "a", "waiting": "b", "unknown": "x", "twice": "aa"}[gone]
    for name in removed:
        steps.remove(name)
    left = [name for name in "ab" if name not in removed]
    assert steps.running + steps.waiting == len(left)
    assert steps.next_batch() == left[:1]


def test_a_new_request_goes_behind_those_that_wait_for_their_next_step() -> None:
    steps = scheduler(max_batch_rows=1)
    add(steps, "ab")
    steps.next_batch()
    add(steps, "c")
    assert [steps.next_batch() for _ in range(3)] == [["b"], ["a"], ["c"]]


class AnySequence(RuleBasedStateMachine):
    """The laws that hold after any sequence of arrivals, steps and departures."""

    max_running, max_rows, capacity = 3, 4, 3

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = StepScheduler[int](self.max_running, self.max_rows, self.capacity)
        self.arrived = 0
        self.present: dict[int, StepNeeds[int]] = {}
        self.batches_without: dict[int, int] = {}

    @precondition(lambda self: not self.scheduler.is_full)
    @rule(key=st.sampled_from("ab"), rows=st.integers(1, 6))
    def arrive(self, key: str, rows: int) -> None:
        needs = StepNeeds(self.arrived, key, rows)
        assert self.scheduler.add(needs) == len(self.present)
        self.arrived += 1
        self.present[needs.request] = needs
        self._wait_from_now()

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.present)))
        del self.present[request]
        self.batches_without.pop(request, None)
        self.scheduler.remove(request)
        self._wait_from_now()

    @rule()
    def step(self) -> None:
        batch = self.scheduler.next_batch()
        needs = [self.present[request] for request in batch]
        assert bool(batch) == bool(self.present)
        assert len(set(batch)) == len(batch)
        assert len({each.batch_key for each in needs}) <= 1
        assert len(batch) <= 1 or sum(each.rows for each in needs) <= self.max_rows
        for request in self.batches_without:
            self.batches_without[request] = 0 if request in batch else self.batches_without[request] + 1

    @invariant()
    def as_many_run_as_may(self) -> None:
        assert self.scheduler.running == min(len(self.present), self.max_running)
        assert self.scheduler.waiting == len(self.present) - self.scheduler.running

    @invariant()
    def nobody_waits_for_more_steps_than_others_run(self) -> None:
        assert all(count < self.max_running for count in self.batches_without.values())

    def _wait_from_now(self) -> None:
        """Those that arrived first are the ones that run."""
        for request in sorted(self.present)[: self.max_running]:
            self.batches_without.setdefault(request, 0)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=50, stateful_step_count=40)
