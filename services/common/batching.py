"""Collects concurrent calls into batches: up to a size, or until the first of them has waited long enough.

Pure asyncio; what a batch computes is the caller's. The queue is bounded: a call beyond its capacity is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from safelight.errors import OverloadedError
from services.common.metrics import Metrics

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchLimits:
    """How a batch is closed and how much may wait."""

    max_size: int
    max_wait_seconds: float
    capacity: int


@dataclass(eq=False)  # told apart by identity: items may be tensors
class _Waiting(Generic[Item, Result]):
    item: Item
    key: Hashable
    arrived: float
    result: asyncio.Future[tuple[Result, float, float]]


class Batcher(Generic[Item, Result]):
    """Runs items in batches of equal key, oldest first.

    Args:
        stage: name in metrics and errors.
        run: computes a batch; returns one result for each item, in order. An exception fails the whole batch.
        limits: size, wait and queue bounds.
        metrics: where queue depth and batch sizes go.
    """

    def __init__(
        self,
        stage: str,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        limits: BatchLimits,
        metrics: Metrics,
    ) -> None:
        self._stage = stage
        self._run = run
        self._limits = limits
        self._metrics = metrics
        self._waiting: list[_Waiting[Item, Result]] = []
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._batch_seconds = 0.0

    def start(self) -> None:
        """Start taking batches; needs a running event loop."""
        self._loop_task = asyncio.create_task(self._loop(), name=f"{self._stage}-batcher")

    async def close(self) -> None:
        """Stop; the calls of items that wait or are being computed are cancelled."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for waiting in self._waiting:
            waiting.result.cancel()
        self._waiting.clear()

    async def submit(self, item: Item, key: Hashable = None) -> tuple[Result, float, float]:
        """The item's result, the seconds it waited and the seconds its batch computed.

        Items of different keys never share a batch.

        Raises:
            OverloadedError: as many items wait already as the capacity allows.
        """
        if len(self._waiting) >= self._limits.capacity:
            raise OverloadedError(
                f"the {self._stage}'s queue is full ({self._limits.capacity} waiting): retry later or add replicas",
                retry_after_seconds=max(self._batch_seconds, 0.05),
                stage=self._stage,
                capacity=str(self._limits.capacity),
            )
        waiting = _Waiting[Item, Result](item, key, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._changed()
        self._arrived.set()
        try:
            return await waiting.result
        finally:
            self._forget(waiting)

    def _forget(self, waiting: _Waiting[Item, Result]) -> None:
        """Drop a cancelled item that no batch has taken yet."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            self._changed()

    def _changed(self) -> None:
        self._metrics.queue_depth.labels(self._stage).set(len(self._waiting))

    async def _loop(self) -> None:
        while True:
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                continue
            if not await self._batch_is_complete():
                continue
            await self._run_batch(self._take())

    async def _batch_is_complete(self) -> bool:
        """Whether the oldest item's batch is full or has waited long enough; if not, waits for that or for news."""
        oldest = self._waiting[0]
        remaining = oldest.arrived + self._limits.max_wait_seconds - time.monotonic()
        if remaining <= 0 or self._same_key(oldest.key) >= self._limits.max_size:
            return True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), remaining)
        return False  # the oldest item may have been cancelled meanwhile

    def _same_key(self, key: Hashable) -> int:
        return sum(waiting.key == key for waiting in self._waiting)

    def _take(self) -> list[_Waiting[Item, Result]]:
        key = self._waiting[0].key
        batch = [waiting for waiting in self._waiting if waiting.key == key][: self._limits.max_size]
        self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
        self._changed()
        return batch

    async def _run_batch(self, batch: list[_Waiting[Item, Result]]) -> None:
        started = time.monotonic()
        self._metrics.batch_size.labels(self._stage).observe(len(batch))
        self._metrics.running.labels(self._stage).set(len(batch))
        try:
            results = await self._run([waiting.item for waiting in batch])
            self._batch_seconds = time.monotonic() - started
            _settle(batch, results, started, self._batch_seconds)
        except Exception as error:  # the worker loop: every item of the batch gets its error, the loop goes on
            _settle(batch, [error] * len(batch), started, 0.0)
        finally:
            self._metrics.running.labels(self._stage).set(0)
            for waiting in batch:  # none is left unless the batcher was closed in the middle
                waiting.result.cancel()


def _settle(
    batch: Sequence[_Waiting[Item, Result]], results: Sequence[Result | Exception], started: float, seconds: float
) -> None:
    for waiting, result in zip(batch, results, strict=True):
        if waiting.result.done():
            continue
        if isinstance(result, Exception):
            waiting.result.set_exception(result)
        else:
            waiting.result.set_result((result, started - waiting.arrived, seconds))
