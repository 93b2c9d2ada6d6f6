"""Laws of merging: only what pays, never at a deadline's cost, and every size is tried some time."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bench.synthetic_device import DeviceCurve, linear_curve, published_curve
from services.denoiser.cost_curve import StepCosts
from tests.support.virtual_device import KEY, VirtualDevice, known


def crowd(device: VirtualDevice, count: int, **needs: Any) -> None:
    for number in range(count):
        device.add(str(number), **needs)


def throughput(device: VirtualDevice) -> float:
    """Rows a second over the run."""
    return sum(device.steps_done[name] * needs.rows for name, needs in device.needs.items()) / device.now


def test_requests_of_one_key_share_a_pass_where_that_pays() -> None:
    device = VirtualDevice()
    crowd(device, 8)
    assert len(device.step()) == 8


def test_where_a_row_costs_what_it_costs_nobody_shares() -> None:
    device = VirtualDevice(curve=linear_curve)
    crowd(device, 8)
    assert [len(device.step()) for _ in range(10)] == [1] * 10


def test_a_gain_within_the_noise_is_no_reason_to_merge() -> None:
    device = VirtualDevice(curve=lambda rows: 0.03 + 0.97 * rows)
    crowd(device, 8)
    assert len(device.step()) == 1


def test_noise_seldom_makes_requests_share_where_that_does_not_pay() -> None:
    draw = random.Random(0)
    device = VirtualDevice(curve=lambda rows: rows * draw.uniform(1.0, 1.1), costs=StepCosts())
    crowd(device, 8, steps=100)
    device.run()
    assert sum(device.steps_done.values()) <= 1.15 * device.passes


def test_the_size_with_the_best_throughput_is_taken() -> None:
    def pays_up_to_four(rows: int) -> float:
        return 1.0 if rows <= 4 else float(rows)

    device = VirtualDevice(curve=pays_up_to_four)
    crowd(device, 8)
    assert len(device.step()) == 4


def test_a_pass_has_no_more_rows_than_the_limit() -> None:
    device = VirtualDevice(max_rows=5)
    crowd(device, 3, rows=2)
    assert len(device.step()) == 2


def test_a_smaller_request_fills_the_rows_that_a_larger_one_leaves() -> None:
    device = VirtualDevice(max_rows=3)
    device.add("a", rows=2)
    device.add("b", rows=2)
    device.add("c", rows=1)
    batch = device.step()
    assert "c" in batch
    assert len(batch) == 2


def test_a_request_with_more_rows_than_the_limit_runs_by_itself() -> None:
    device = VirtualDevice(max_rows=2)
    crowd(device, 2, rows=3)
    assert {len(device.step()) for _ in range(4)} == {1}


def test_requests_of_different_keys_never_share() -> None:
    device = VirtualDevice()
    for name, key in (("a", "small"), ("b", "large"), ("c", "small"), ("d", "large")):
        device.add(name, key=key)
    for _ in range(20):
        assert len({device.needs[name].batch_key for name in device.step()}) <= 1


def test_a_request_that_runs_alone_shares_with_nobody() -> None:
    device = VirtualDevice()
    crowd(device, 3, alone=True, rows=2)
    device.add("mergeable")
    device.add("too")
    batches = [set(device.step()) for _ in range(40)]
    assert {frozenset(batch) for batch in batches if batch} <= {
        frozenset({"0"}), frozenset({"1"}), frozenset({"2"}), frozenset({"mergeable", "too"}),
    }  # fmt: skip


def test_a_row_that_runs_by_itself_is_learnt_as_such() -> None:
    device = VirtualDevice(costs=StepCosts())
    device.add("exact", rows=2, alone=True)
    device.run()
    assert [(point.rows, point.seconds) for point in device.costs.points()] == [(1, 1.0)]


def test_a_pass_is_no_larger_than_a_deadline_allows() -> None:
    device = VirtualDevice()
    crowd(device, 7, steps=50)
    device.add("tight", steps=10, deadline=15.0)  # 1.5 seconds a step, and 8 rows take 2.55
    device.run()
    assert device.took["tight"] <= 15.0


def test_a_deadline_with_time_to_spare_costs_no_throughput() -> None:
    device = VirtualDevice()
    crowd(device, 7, steps=50)
    device.add("easy", steps=10, deadline=100.0)
    assert len(device.step()) == 8


@pytest.mark.parametrize(("curve", "worth"), [(published_curve, 2.9), (linear_curve, 0.98)])
def test_the_curve_is_learnt_from_nothing(curve: DeviceCurve, worth: float) -> None:
    device = VirtualDevice(curve=curve, costs=StepCosts())
    crowd(device, 8, steps=200)
    device.run()
    assert throughput(device) >= worth


def test_tight_deadlines_do_not_keep_a_curve_unknown() -> None:
    device = VirtualDevice(costs=StepCosts())
    for number in range(300):
        device.add(str(number), steps=4, deadline=device.now + 7.5)  # too tight for two rows, if a row costs one second
        device.add(f"{number} too", steps=4, deadline=device.now + 7.5)
        device.run()
    assert device.costs.trusted_rows(KEY) == 2
    assert device.took["299"] == device.took["299 too"] == pytest.approx(4 * published_curve(2))


def test_a_curve_that_turns_bad_is_unlearnt() -> None:
    device = VirtualDevice()
    crowd(device, 8, steps=1000)
    device.run(passes=50)
    device.curve = linear_curve
    device.run(passes=40)
    assert len(device.step()) == 1


def test_a_curve_that_turns_good_is_noticed() -> None:
    device = VirtualDevice(curve=linear_curve)
    crowd(device, 8, steps=2000)
    device.run(passes=50)
    device.curve = published_curve
    device.run(passes=1000)
    assert len(device.step()) >= 4


def test_a_hiccup_in_the_first_pass_of_a_size_does_not_keep_it_from_being_used() -> None:
    slow = {8}

    def hiccup(rows: int) -> float:
        if rows not in slow:
            return published_curve(rows)
        slow.remove(rows)
        return 60.0

    device = VirtualDevice(curve=hiccup, costs=StepCosts())
    crowd(device, 8, steps=1000)
    device.run(passes=20)
    assert len(device.step()) == 8


def test_a_slow_first_pass_of_any_size_keeps_none_from_being_used() -> None:
    seen = {1, 2, 4, 8}

    def slow_at_first(rows: int) -> float:
        if rows in seen:
            return published_curve(rows)
        seen.add(rows)
        return 3 * published_curve(rows)

    device = VirtualDevice(curve=slow_at_first, costs=known(published_curve, seen))
    crowd(device, 6, steps=20)
    device.run()
    assert device.passes == 20


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 2)), min_size=1, max_size=10),
)
def test_on_no_known_curve_is_it_slower_than_one_after_the_other(
    increments: list[float], requests: list[tuple[int, int]]
) -> None:
    def curve(rows: int) -> float:
        return sum(increments[:rows])

    device = VirtualDevice(curve=curve, costs=known(curve, range(1, 9)))
    for number, (steps, rows) in enumerate(requests):
        device.add(str(number), steps=steps, rows=rows)
    serial = sum(device.solo_seconds(name) for name in device.needs)
    device.run()
    assert device.now <= serial / 0.98 + 2 * curve(8)
