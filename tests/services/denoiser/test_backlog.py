"""Laws of the backlog: it is the time that the device will really need."""

from __future__ import annotations

import pytest

from bench.synthetic_device import DeviceCurve, linear_curve, published_curve
from tests.support.virtual_device import VirtualDevice


def test_an_idle_scheduler_has_none() -> None:
    assert VirtualDevice().scheduler.backlog_seconds() == 0.0


def test_of_one_request_it_is_its_own_time() -> None:
    device = VirtualDevice()
    device.add("a", steps=10, rows=2)
    assert device.scheduler.backlog_seconds() == pytest.approx(10 * published_curve(2))


def test_it_counts_the_steps_that_are_left() -> None:
    device = VirtualDevice()
    device.add("a", steps=10)
    device.run(passes=4)
    assert device.scheduler.backlog_seconds() == pytest.approx(6.0)


def test_requests_that_share_passes_need_less_than_one_after_the_other() -> None:
    device = VirtualDevice()
    for name in "abcd":
        device.add(name, steps=10)
    assert device.scheduler.backlog_seconds() == pytest.approx(10 * published_curve(4))


def test_a_request_that_runs_alone_shares_with_nobody() -> None:
    device = VirtualDevice()
    for name in "abcd":
        device.add(name, steps=10, rows=2, alone=True)
    assert device.scheduler.backlog_seconds() == pytest.approx(4 * 10 * 2.0)


@pytest.mark.parametrize("curve", [published_curve, linear_curve])
def test_it_is_near_the_time_that_it_then_takes(curve: DeviceCurve) -> None:
    device = VirtualDevice(curve=curve)
    for number in range(12):
        device.add(str(number), steps=4 + 4 * number, rows=1 + number % 2)
    expected = device.scheduler.backlog_seconds()
    device.run()
    assert device.now == pytest.approx(expected, rel=0.15)
