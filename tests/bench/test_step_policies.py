"""Laws of the simulated device and of the rivals on it."""

from __future__ import annotations

import pytest

from bench.arrival_traces import Arrival, mixed_requests, short_and_long
from bench.step_policies import EqualKeyBatcher, StepSchedulerPolicy
from bench.synthetic_device import SchedulingPolicy, linear_curve, published_curve, simulate


def arrivals(*steps: int) -> list[Arrival]:
    return [Arrival(number, 0.0, each, 1, "euler") for number, each in enumerate(steps)]


def test_the_published_curve_is_as_published() -> None:
    assert [published_curve(rows) for rows in (1, 2, 3, 4, 8, 16)] == [1.00, 1.10, 1.12, 1.44, 2.55, 4.99]


def test_one_at_a_time_serves_in_order_of_arrival() -> None:
    run = simulate(EqualKeyBatcher(1), published_curve, arrivals(4, 50, 4))
    assert run.finished == {0: 4.0, 1: 54.0, 2: 58.0}


def test_the_batcher_of_equals_merges_what_waits_with_an_equal_key() -> None:
    run = simulate(EqualKeyBatcher(16), published_curve, arrivals(4, 50, 4))
    assert run.finished == pytest.approx({0: 4.4, 2: 4.4, 1: 54.4})


@pytest.mark.parametrize("clients", [None, 8])
@pytest.mark.parametrize(
    "policy", [EqualKeyBatcher(1), EqualKeyBatcher(16), StepSchedulerPolicy(published_curve, None)], ids=type
)
def test_every_request_ends_after_it_arrived(policy: SchedulingPolicy, clients: int | None) -> None:
    trace = mixed_requests(30, seed=1) if clients else short_and_long(30, 0.2, seed=1)
    run = simulate(policy, published_curve, trace, clients)
    assert all(run.finished[arrival.number] > arrival.time for arrival in trace)


def test_closed_loop_clients_keep_so_many_requests_in_flight() -> None:
    run = simulate(StepSchedulerPolicy(linear_curve, None), linear_curve, arrivals(*[4] * 20), clients=2)
    assert run.end == pytest.approx(80.0)


def test_requests_leave_when_their_deadline_has_passed() -> None:
    run = simulate(StepSchedulerPolicy(linear_curve, 3.0), linear_curve, arrivals(*[4] * 20))
    assert len(run.finished) == 3
    assert run.end <= 13.0
