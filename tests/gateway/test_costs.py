"""Laws of costs: what was measured is taken as it is, what was not comes from the nearest that was."""

from __future__ import annotations

import pytest

from gateway.costs import Costs
from gateway.work import Work
from safelight.v1.load_service_pb2 import WorkCost

SHAPE = (4, 8, 8)


def costs(curve: dict[int, float]) -> Costs:
    return Costs(
        WorkCost(model="tiny", latent_shape=SHAPE, rows=rows, seconds=seconds) for rows, seconds in curve.items()
    )


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [(1, 1.0), (2, 2.0), (3, 2.5), (4, 3.0), (8, 6.0)],
    ids=["in proportion below", "measured", "between", "measured", "in proportion above"],
)
def test_a_pass_costs_what_was_measured_or_what_its_neighbours_say(rows: int, seconds: float) -> None:
    assert costs({2: 2.0, 4: 3.0}).seconds(Work("tiny", SHAPE, rows)) == pytest.approx(seconds)


def test_a_shape_that_was_not_measured_is_scaled_by_area_from_the_nearest_that_was() -> None:
    both = Costs(
        [
            WorkCost(model="tiny", latent_shape=SHAPE, rows=1, seconds=1.0),
            WorkCost(model="tiny", latent_shape=(4, 64, 64), rows=1, seconds=100.0),
        ]
    )
    assert both.seconds(Work("tiny", (4, 8, 16), passes=3)) == pytest.approx(6.0)
    assert both.seconds(Work("tiny", (4, 64, 128))) == pytest.approx(200.0)


def test_of_another_model_or_another_kind_of_shape_nothing_is_known() -> None:
    measured = costs({1: 1.0})
    assert measured.seconds(Work("other", SHAPE)) is None
    assert measured.seconds(Work("tiny", (4, 3, 8, 8))) is None
    assert measured.seconds(Work("tiny")) is None


def test_among_others_work_takes_its_part_of_the_most_efficient_pass() -> None:
    measured = costs({1: 1.0, 4: 2.0, 8: 8.0})
    assert measured.device_seconds(Work("tiny", SHAPE, rows=2, passes=3)) == pytest.approx(3.0)
    assert measured.device_seconds(Work("other", SHAPE)) is None
