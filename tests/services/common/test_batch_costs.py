"""Laws of measured costs: hiccups do not count, unknown sizes are never promised to be cheaper, memory is bounded."""

from __future__ import annotations

import pytest

from services.common.batch_costs import BatchCosts, WorkKind

KIND = WorkKind("sd15", (4, 8, 8))


def measured(sizes: dict[int, list[float]]) -> BatchCosts:
    costs = BatchCosts()
    for size, samples in sizes.items():
        for seconds in (99.0, *samples):  # the first of a size warms up
            costs.record(KIND, size, seconds)
    return costs


def test_what_was_never_measured_costs_nothing_yet() -> None:
    assert BatchCosts().seconds(KIND, 1) == 0.0


def test_the_first_batch_of_a_size_only_warms_up() -> None:
    costs = BatchCosts()
    costs.record(KIND, 1, 9.0)
    assert costs.measured(KIND) == {}
    costs.record(KIND, 1, 0.5)
    assert costs.measured(KIND) == {1: 0.5}


def test_a_hiccup_is_outvoted_and_a_change_that_stays_is_believed() -> None:
    costs = measured({1: [1.0, 1.0, 50.0, 1.0]})
    assert costs.seconds(KIND, 1) == 1.0
    for _ in range(4):
        costs.record(KIND, 1, 3.0)
    assert costs.seconds(KIND, 1) == 3.0


@pytest.mark.parametrize(("size", "seconds"), [(1, 3.0), (2, 3.0), (3, 5.0), (4, 5.0), (8, 10.0)])
def test_an_unmeasured_size_costs_what_the_next_larger_does_and_beyond_that_its_share(
    size: int, seconds: float
) -> None:
    assert measured({2: [3.0], 4: [5.0]}).seconds(KIND, size) == seconds


def test_the_kinds_that_were_longest_unused_are_forgotten() -> None:
    costs = BatchCosts()
    for height in range(1000):
        costs.record(KIND, 1, 1.0)
        costs.record(WorkKind("sd15", (4, height, 8)), 1, 1.0)
    assert len(costs.kinds) <= 64
    assert KIND in costs.kinds
