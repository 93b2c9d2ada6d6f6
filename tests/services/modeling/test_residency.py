"""Laws of the residency plan: it keeps to the budget, keeps what fits, and spreads what streams."""

from __future__ import annotations

from itertools import groupby

import pytest

from services.modeling.residency import plan_residency

SIZES = (700, 300, 300, 20, 680, 680, 680, 283, 283, 283, 283, 5)


@pytest.mark.parametrize("budget", [None, sum(SIZES), 10**9])
def test_everything_stays_where_everything_fits(budget: int | None) -> None:
    plan = plan_residency(SIZES, budget)
    assert all(plan.resident)
    assert (plan.slots, plan.peak_bytes) == (0, sum(SIZES))


def test_nothing_stays_without_a_budget() -> None:
    plan = plan_residency(SIZES, 0)
    assert not any(plan.resident)
    assert plan.peak_bytes == 2 * max(SIZES)


@pytest.mark.parametrize("budget", range(0, sum(SIZES), 97))
def test_the_peak_is_within_the_budget_or_two_blocks(budget: int) -> None:
    assert plan_residency(SIZES, budget).peak_bytes <= max(budget, 2 * max(SIZES))


@pytest.mark.parametrize("budget", range(2 * max(SIZES), sum(SIZES), 97))
def test_no_block_that_would_still_fit_streams(budget: int) -> None:
    plan = plan_residency(SIZES, budget)
    left = budget - 2 * max(SIZES) - plan.resident_bytes
    assert all(size > left for size, stays in zip(SIZES, plan.resident, strict=True) if not stays)


@pytest.mark.parametrize("stay", range(1, 38))
def test_equal_blocks_stream_in_runs_as_short_as_can_be(stay: int) -> None:
    resident = plan_residency([100] * 40, 100 * (stay + 2)).resident
    assert resident.count(True) == stay
    runs = [len(list(run)) for stays, run in groupby(resident) if not stays]
    assert max(runs) <= -(-40 // stay)
    assert max(runs) - min(runs[:-1] or runs) <= 1


def test_a_network_of_one_block_has_one_slot() -> None:
    plan = plan_residency([50], 0)
    assert (plan.slots, plan.peak_bytes) == (1, 50)
