"""Laws of the cost curve: measured where it was seen, cautious where it was not, and not misled by a hiccup."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.denoiser.cost_curve import CostPoint, StepCosts


def costs(**seconds: float) -> StepCosts:
    """A curve measured at these sizes: costs(r1=1.0, r4=1.5)."""
    measured = StepCosts()
    for rows, each in seconds.items():
        measured.record("key", int(rows[1:]), each)
    return measured


def test_a_measured_size_costs_what_was_measured() -> None:
    assert costs(r1=1.0, r4=1.5).seconds("key", 4) == 1.5


def test_between_two_measured_sizes_the_cost_is_interpolated() -> None:
    assert costs(r4=1.0, r8=2.0).seconds("key", 6) == pytest.approx(1.5)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_outside_the_measured_sizes_a_row_costs_what_it_costs_at_the_nearest(rows: int) -> None:
    nearest = 4 if rows < 4 else 8
    known = costs(r4=1.0, r8=1.6)
    assert known.seconds("key", rows) / rows == pytest.approx(known.seconds("key", nearest) / nearest)


@given(st.dictionaries(st.integers(1, 16), st.floats(0.01, 10.0), min_size=1), st.integers(1, 32))
def test_an_estimate_never_promises_more_rows_a_second_than_were_seen(seen: dict[int, float], rows: int) -> None:
    known = costs(**{f"r{size}": seconds for size, seconds in seen.items()})
    best = min(seconds / size for size, seconds in seen.items())
    assert known.seconds("key", rows) / rows >= best * (1 - 1e-9)


def test_a_key_without_a_measurement_is_taken_to_be_linear() -> None:
    assert StepCosts().seconds("key", 8) == pytest.approx(8 * StepCosts().seconds("key", 1))


def test_a_row_of_an_unknown_key_is_taken_to_cost_what_the_cheapest_known_one_does() -> None:
    assert costs(r1=1.0, r4=2.0).seconds("unknown", 3) == pytest.approx(1.5)


def test_the_curves_of_the_last_keys_are_kept() -> None:
    known = costs(r1=1.0)
    for number in range(1000):
        known.record(number, 1, 2.0)
        known.record("key", 1, 1.0)
    assert len(known.points()) <= 64
    assert known.seconds("key", 1) == 1.0


def test_keys_do_not_mix() -> None:
    known = costs(r1=1.0)
    known.record("other", 1, 9.0)
    assert (known.seconds("key", 1), known.seconds("other", 1)) == (1.0, 9.0)


def test_a_hiccup_does_not_move_the_curve() -> None:
    known = costs(r4=1.0)
    for seconds in (1.0, 50.0, 1.0, 1.0):
        known.record("key", 4, seconds)
    assert known.seconds("key", 4) == 1.0


@pytest.mark.parametrize("rows", [6, 16])
def test_the_first_pass_of_a_size_costs_no_more_than_known_ones_say(rows: int) -> None:
    known = costs(r4=1.0, r8=1.6)
    estimate = known.seconds("key", rows)
    known.record("key", rows, 10 * estimate)
    assert known.seconds("key", rows) == estimate
    for _ in range(2):
        known.record("key", rows, 10 * estimate)
    assert known.seconds("key", rows) == 10 * estimate


def test_a_device_that_has_become_slower_is_believed_after_three_passes() -> None:
    known = costs(r4=1.0)
    for _ in range(4):
        known.record("key", 4, 1.0)
    for _ in range(3):
        known.record("key", 4, 2.0)
    assert known.seconds("key", 4) == 2.0


def test_a_pass_that_was_much_faster_is_believed_at_once() -> None:
    known = costs(r4=4.0)
    for seconds in (4.0, 4.0, 1.5):
        known.record("key", 4, seconds)
    assert known.seconds("key", 4) == 1.5


def test_a_size_is_trusted_once_it_can_outvote_a_hiccup() -> None:
    known = costs(r2=1.0)
    assert known.trusted_rows("key") == 0
    known.record("key", 2, 1.0)
    known.record("key", 2, 1.0)
    known.record("key", 8, 1.0)
    assert known.trusted_rows("key") == 2


def test_its_points_are_what_was_measured() -> None:
    known = costs(r8=2.0, r1=1.0)
    assert known.points() == [CostPoint("key", 1, 1.0), CostPoint("key", 8, 2.0)]
