"""How long a call waits before it is sent again, and when it gives up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from safelight.errors import OverloadedError, SafelightError, StageUnavailableError

# A gateway that is there again shall not wait for us: it keeps our work for some seconds only.
_FIRST_RECONNECT_SECONDS = 0.1
_LONGEST_RECONNECT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """What a client waits for instead of raising an error; `RetryPolicy.none` waits for nothing.

    A gateway that is too busy, or that has no healthy replica at the moment, says when to come back. The request is
    sent again no earlier than that, and later by a random time, so that many clients don't come back at once. It does
    not wait where that would go beyond the call's `timeout_seconds`.

    Args:
        max_attempts: times a request is begun in all; 1: never again.
        max_wait_seconds: time that one call spends waiting in all.
        first_wait_seconds: most random time that is added to the first wait; it doubles with each one after it.
        longest_wait_seconds: where the doubling ends.
        reconnect_seconds: how long a lost gateway is looked for before the call fails; 0: not at all.
    """

    none: ClassVar[RetryPolicy]

    max_attempts: int = 10
    max_wait_seconds: float = 60.0
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 8.0
    reconnect_seconds: float = 30.0


RetryPolicy.none = RetryPolicy(max_attempts=1, reconnect_seconds=0.0)


@dataclass
class Retries:
    """The tries of one call.

    Args:
        policy: of the client.
        timeout_seconds: time that the call has; None: no limit.
        draw: a random number in [0, 1).
        now: a clock in seconds.
    """

    policy: RetryPolicy
    timeout_seconds: float | None = None
    draw: Callable[[], float] = random.random
    now: Callable[[], float] = time.monotonic
    _started: float = field(init=False)
    _attempts: int = 1
    _waited_seconds: float = 0.0
    _loss: SafelightError | None = None
    _lost_at: float = 0.0
    _reconnects: int = 0

    def __post_init__(self) -> None:
        self._started = self.now()

    def remaining_seconds(self) -> float | None:
        """Time left to the call; None: no limit."""
        if self.timeout_seconds is None:
            return None
        return max(self._started + self.timeout_seconds - self.now(), 0.0)

    def after_refusal(self, error: SafelightError) -> float:
        """Seconds to wait before a refused request is sent again.

        Raises:
            SafelightError: the error itself, where sending again does not help, or not in time.
        """
        if not isinstance(error, (OverloadedError, StageUnavailableError)) or error.retry_after_seconds is None:
            raise error
        policy = self.policy
        spread = self._spread(self._attempts - 1, policy.first_wait_seconds, policy.longest_wait_seconds)
        wait = error.retry_after_seconds + spread
        self._count_attempt(error)
        if self._waited_seconds + wait > policy.max_wait_seconds or not self._in_time(wait):
            raise error
        self._waited_seconds += wait
        return wait

    def after_loss(self, error: SafelightError) -> float:
        """Seconds to wait before the gateway is called again after its connection was lost.

        Raises:
            SafelightError: the error itself; the gateway has been looked for long enough.
        """
        now = self.now()
        if self._reconnects == 0:
            self._lost_at = now
        wait = self._spread(self._reconnects, _FIRST_RECONNECT_SECONDS, _LONGEST_RECONNECT_SECONDS)
        self._loss, self._reconnects = error, self._reconnects + 1
        if now + wait >= self._lost_at + self.policy.reconnect_seconds or not self._in_time(wait):
            raise error
        return wait

    def note_event(self) -> None:
        """The gateway is there."""
        self._reconnects = 0

    def note_restart(self) -> None:
        """The gateway has begun the request anew after its connection was lost.

        Raises:
            SafelightError: what was lost then; the request has been begun often enough.
        """
        if self._loss is not None:
            self._count_attempt(self._loss)

    def _count_attempt(self, error: SafelightError) -> None:
        if self._attempts >= self.policy.max_attempts:
            raise error
        self._attempts += 1

    def _spread(self, doublings: int, first: float, longest: float) -> float:
        """A random part of a bound that doubles from `first` to `longest`."""
        return self.draw() * min(longest, first * 2.0 ** min(doublings, 30))

    def _in_time(self, wait: float) -> bool:
        remaining = self.remaining_seconds()
        return remaining is None or wait < remaining
