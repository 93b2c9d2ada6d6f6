"""Laws of coming back: not before there is room, not all at once, not for ever."""

from __future__ import annotations

import pytest

from gateway.retry_times import RetryTimes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_those_refused_together_return_at_the_pace_at_which_work_is_done() -> None:
    times = RetryTimes(Clock())
    assert [times.after(2.0, 0.5) for _ in range(4)] == pytest.approx([2.0, 2.5, 3.0, 3.5])


def test_a_quiet_time_forgets_who_was_refused_before() -> None:
    clock = Clock()
    times = RetryTimes(clock)
    times.after(2.0, 0.5)
    clock.now += 60
    assert times.after(2.0, 0.5) == pytest.approx(2.0)


def test_the_spread_is_bounded() -> None:
    times = RetryTimes(Clock())
    assert max(times.after(1.0, 1.0) for _ in range(1000)) == pytest.approx(31.0)


def test_nobody_is_asked_to_come_back_at_once() -> None:
    assert RetryTimes(Clock()).after(-1.0, 0.0) > 0
