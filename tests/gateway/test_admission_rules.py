"""Laws of admission: deadlines and bounded queues, and the most steps that fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission_rules import AdmissionRules, most_steps
from gateway.estimate import Estimate, StageTime

RULES = AdmissionRules(max_queue_seconds=10.0, deadline_factor=1.0)


def estimate(seconds: float = 1.0, ahead: float = 0.0, alone: float = 1.0) -> Estimate:
    time = StageTime(ahead=ahead, each=alone, busy=alone, alone=alone, done=ahead + alone)
    return Estimate(seconds, alone, {"denoiser": time})


@pytest.mark.parametrize(("remaining", "fits"), [(None, True), (5.1, True), (5.0, True), (4.9, False)])
def test_an_estimate_beyond_the_deadline_does_not_fit(remaining: float | None, fits: bool) -> None:
    assert RULES.fits(estimate(seconds=5.0), remaining) is fits


def test_a_factor_above_one_gives_estimates_the_benefit_of_the_doubt() -> None:
    lenient = AdmissionRules(10.0, 1.25)
    assert lenient.fits(estimate(seconds=6.0), 5.0)
    assert not lenient.fits(estimate(seconds=6.5), 5.0)


@pytest.mark.parametrize(
    ("ahead", "alone", "fits"),
    [(9.0, 1.0, True), (9.1, 1.0, False), (5.0, 1000.0, True), (5.1, 1000.0, False), (0.0, 1000.0, True)],
)
def test_the_queue_is_bounded_with_the_requests_own_work_and_half_of_it_is_open_to_all(
    ahead: float, alone: float, fits: bool
) -> None:
    assert RULES.fits(estimate(ahead=ahead, alone=alone), None) is fits


def test_the_full_stage_is_named() -> None:
    idle, full = StageTime(0, 1, 1, 1, 1), StageTime(99, 1, 1, 1, 100)
    assert RULES.full_stage(Estimate(1, 1, {"denoiser": idle, "decoder": full})) == "decoder"
    assert RULES.full_stage(Estimate(1, 1, {"denoiser": idle, "decoder": idle})) is None


@given(fewest=st.integers(1, 50), spread=st.integers(0, 200), limit=st.integers(0, 300))
def test_the_most_steps_that_fit_are_found(fewest: int, spread: int, limit: int) -> None:
    most = fewest + spread
    expected = min(limit, most) if limit >= fewest else None
    assert most_steps(fewest, most, lambda steps: steps <= limit) == expected
