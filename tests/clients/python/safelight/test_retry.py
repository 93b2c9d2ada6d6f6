"""How long a client waits: never before it is told to, never all at once, never for ever."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import (
    InvalidRequestError,
    OutOfMemoryError,
    OverloadedError,
    RetryPolicy,
    SafelightError,
    StageUnavailableError,
)
from safelight.retry import Retries

BUSY = OverloadedError("full", retry_after_seconds=2.0)
LOST = StageUnavailableError("gone")
POLICY = RetryPolicy(max_attempts=5, max_wait_seconds=100.0, first_wait_seconds=1.0, longest_wait_seconds=4.0)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def retries(policy: RetryPolicy = POLICY, timeout: float | None = None, drawn: float = 0.5) -> tuple[Retries, Clock]:
    clock = Clock()
    return Retries(policy, timeout, draw=lambda: drawn, now=clock), clock


def test_a_refused_request_waits_as_told_and_a_doubling_random_time_on_top() -> None:
    tries, _ = retries()
    assert [tries.after_refusal(BUSY) for _ in range(4)] == [2.5, 3.0, 4.0, 4.0]


@given(
    hints=st.lists(st.floats(0, 30), min_size=1, max_size=40),
    drawn=st.floats(0, 1, exclude_max=True),
    attempts=st.integers(1, 12),
)
def test_every_wait_is_within_its_bounds_and_all_of_them_within_the_policy_s(
    hints: list[float], drawn: float, attempts: int
) -> None:
    policy = RetryPolicy(max_attempts=attempts, max_wait_seconds=50.0)
    tries, _ = retries(policy, drawn=drawn)
    hints += [1.0] * attempts
    waits = waits_of(tries, hints)
    assert len(waits) < attempts
    assert sum(waits) <= policy.max_wait_seconds
    assert all(hint <= wait <= hint + policy.longest_wait_seconds for hint, wait in zip(hints, waits, strict=False))


def waits_of(tries: Retries, hints: Sequence[float]) -> list[float]:
    """What a call waits that is refused with one hint after the other, until it is given up."""
    waits: list[float] = []
    with suppress(OverloadedError):
        waits.extend(tries.after_refusal(OverloadedError("full", retry_after_seconds=hint)) for hint in hints)
    return waits


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError.of("width", "is wrong"),
        OutOfMemoryError("too large", retry_after_seconds=1.0),
        OverloadedError("a message larger than gRPC takes"),
        StageUnavailableError("no healthy replica"),
    ],
)
def test_what_does_not_say_when_to_come_back_is_final(error: SafelightError) -> None:
    tries, _ = retries()
    with pytest.raises(type(error)) as caught:
        tries.after_refusal(error)
    assert caught.value is error


def test_a_stage_without_replicas_is_waited_for() -> None:
    tries, _ = retries()
    assert tries.after_refusal(StageUnavailableError("no replica", retry_after_seconds=1.0)) == 1.5


def test_a_wait_beyond_the_call_s_time_is_not_begun() -> None:
    tries, clock = retries(timeout=6.0)
    assert tries.after_refusal(BUSY) == 2.5
    clock.seconds = 3.0
    assert tries.remaining_seconds() == 3.0
    with pytest.raises(OverloadedError):
        tries.after_refusal(BUSY)


def test_the_policy_none_waits_for_nothing() -> None:
    tries, _ = retries(RetryPolicy.none)
    with pytest.raises(OverloadedError):
        tries.after_refusal(BUSY)
    with pytest.raises(StageUnavailableError):
        tries.after_loss(LOST)


def test_a_lost_gateway_is_looked_for_often_and_for_a_bounded_time() -> None:
    tries, clock = retries(RetryPolicy(reconnect_seconds=10.0), drawn=0.999)
    waits = []
    for wait in iter(lambda: wait_of(tries), None):
        waits.append(wait)
        clock.seconds += wait
    assert max(waits) < 1.0
    assert 8.0 < sum(waits) < 10.0


def wait_of(tries: Retries) -> float | None:
    """The wait after a loss; None when the gateway is given up."""
    try:
        return tries.after_loss(LOST)
    except StageUnavailableError:
        return None


def test_a_gateway_that_is_back_is_looked_for_anew_when_it_is_lost_again() -> None:
    tries, clock = retries(RetryPolicy(reconnect_seconds=10.0))
    for _ in range(5):
        assert tries.after_loss(LOST) == 0.05
        clock.seconds += 9.0
        tries.note_event()


def test_a_request_that_is_begun_anew_too_often_fails_with_what_was_lost() -> None:
    tries, _ = retries(RetryPolicy(max_attempts=3))
    for _ in range(2):
        tries.after_loss(LOST)
        tries.note_restart()
    tries.after_loss(LOST)
    with pytest.raises(StageUnavailableError) as caught:
        tries.note_restart()
    assert caught.value is LOST
