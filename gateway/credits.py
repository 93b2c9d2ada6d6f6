"""Backpressure over all stages: how many pictures may be between their first tensor and their file.

A picture takes a credit before its prompt is encoded and gives it back when its file is written. There are as many as
the stage that takes least offers to take, so tensors never pile up in front of a slow one; every other picture waits
here, where it costs a few bytes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from safelight.errors import DeadlineExceededError
from services.common.metrics import Metrics


class Credits:
    """Hands out a bounded number of credits: tenants that wait take turns, and each is served first come, first served.

    Args:
        offered: how many there are at the moment; at least one is always taken to be there.
        metrics: where it is shown how many are held, and how many pictures wait.
    """

    def __init__(self, offered: Callable[[], int], metrics: Metrics) -> None:
        self._offered = offered
        self._metrics = metrics
        self._held = 0
        # By tenant; the one whose turn is next is first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def all_held(self) -> bool:
        """Whether the next picture would have to wait."""
        return self._held >= max(self._offered(), 1)

    @asynccontextmanager
    async def held(self, tenant: str, remaining_seconds: float | None) -> AsyncIterator[None]:
        """Wait for a credit, and hold it.

        Args:
            tenant: whose picture it is for.
            remaining_seconds: longest wait; None: no limit.

        Raises:
            DeadlineExceededError: none has become free in that time.
        """
        await self._take(tenant, remaining_seconds)
        try:
            yield
        finally:
            self._held -= 1
            self._hand_out()

    async def _take(self, tenant: str, remaining_seconds: float | None) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._hand_out()
        expiry = None if remaining_seconds is None else loop.call_later(remaining_seconds, _expire, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # it got its turn in the same moment
                self._held -= 1
            raise
        finally:
            if expiry is not None:
                expiry.cancel()
            self._forget(tenant, turn)
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and not self.all_held:
            tenant = next(iter(self._waiting))
            turns = self._waiting.pop(tenant)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns  # behind the others
            if not turn.done():
                self._held += 1
                turn.set_result(None)
        self._metrics.credits.labels("held").set(self._held)
        self._metrics.credits.labels("waiting").set(sum(map(len, self._waiting.values())))

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        """Drop one that waits no longer."""
        turns = self._waiting.get(tenant, deque())
        with suppress(ValueError):
            turns.remove(turn)
        if not turns:
            self._waiting.pop(tenant, None)


def _expire(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(
            DeadlineExceededError("the request's deadline has passed while it waited for the stages; nothing was made")
        )
