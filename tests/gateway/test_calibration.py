"""Laws of calibration: learnt from the last minute's requests, never less than nothing, and with bounds."""

from __future__ import annotations

import pytest

from gateway.calibration import Calibration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def calibrated(*taken: tuple[float, float]) -> Calibration:
    calibration = Calibration(Clock())
    for estimated, real in taken:
        calibration.note(estimated, real)
    return calibration


def test_nothing_is_added_before_anything_is_known() -> None:
    assert calibrated().extra_seconds(5.0) == 0.0


def test_the_median_of_what_requests_took_longer_is_added() -> None:
    assert calibrated((2.0, 2.4), (2.0, 3.0), (2.0, 90.0)).extra_seconds(2.0) == pytest.approx(1.0)


def test_what_is_a_large_part_of_short_requests_is_little_to_long_ones() -> None:
    assert calibrated(*[(0.1, 0.2)] * 5).extra_seconds(60.0) == pytest.approx(0.1)


def test_what_long_requests_took_longer_is_in_proportion_for_short_ones() -> None:
    assert calibrated(*[(60.0, 66.0)] * 5).extra_seconds(1.0) == pytest.approx(0.1)


def test_an_estimate_is_never_lowered_and_at_most_doubled() -> None:
    assert calibrated((2.0, 1.0)).extra_seconds(2.0) == 0.0
    assert calibrated((2.0, 90.0)).extra_seconds(2.0) == pytest.approx(2.0)


def test_what_is_older_than_a_minute_is_forgotten() -> None:
    clock = Clock()
    calibration = Calibration(clock)
    calibration.note(1.0, 1.5)
    clock.now += 59
    assert calibration.extra_seconds(1.0) == pytest.approx(0.5)
    clock.now += 2
    assert calibration.extra_seconds(1.0) == 0.0
