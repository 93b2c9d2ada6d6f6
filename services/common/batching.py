"""Collects concurrent calls into batches: up to a size, or until the first of them has waited long enough.

Pure asyncio; what a batch computes is the caller's. The queue is bounded: a call beyond its capacity is refused. What
batches cost is measured, so that the load at any moment can be told in seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from safelight.errors import OverloadedError
from safelight.v1.load_service_pb2 import GetLoadResponse, WorkCost
from services.common.batch_costs import BatchCosts, WorkKind
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
    kind: WorkKind
    key: Hashable
    arrived: float
    result: asyncio.Future[tuple[Result, float, float]]


class Batcher(Generic[Item, Result]):
    """Runs items in batches of equal kind and key, oldest first.

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
        self._costs = BatchCosts()
        self._running: list[_Waiting[Item, Result]] = []
        self._running_since = 0.0

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

    async def submit(
        self, item: Item, kind: WorkKind, key: Hashable = None, *, admitted: bool = False
    ) -> tuple[Result, float, float]:
        """The item's result, the seconds it waited and the seconds its batch computed.

        Items of different kinds or keys never share a batch. What is `admitted` goes on with work that was let in, and
        is never refused.

        Raises:
            OverloadedError: as many items wait already as the capacity allows.
        """
        if len(self._waiting) >= self._limits.capacity and not admitted:
            raise OverloadedError(
                f"the {self._stage}'s queue is full ({self._limits.capacity} waiting): retry later or add replicas",
                retry_after_seconds=max(self.backlog_seconds(), 0.05),
                stage=self._stage,
                capacity=str(self._limits.capacity),
            )
        result: asyncio.Future[tuple[Result, float, float]] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(item, kind, key, time.monotonic(), result)
        self._waiting.append(waiting)
        self._changed()
        self._arrived.set()
        try:
            return await waiting.result
        finally:
            self._forget(waiting)

    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def load(self) -> GetLoadResponse:
        """How busy the stage is at the moment, and what its work has cost so far."""
        costs = [
            WorkCost(model=kind.model, latent_shape=kind.latent_shape, rows=size, seconds=seconds)
            for kind in self._costs.kinds
            for size, seconds in self._costs.measured(kind).items()
        ]
        return GetLoadResponse(
            running=len(self._running),
            waiting=len(self._waiting),
            capacity=self._limits.max_size + self._limits.capacity,
            backlog_seconds=self.backlog_seconds(),
            costs=costs,
        )

    def backlog_seconds(self) -> float:
        """Seconds until everything accepted so far is done; what has never been measured counts nothing."""
        return self._running_seconds() + sum(
            self._seconds(kind, count) for (kind, _), count in Counter((w.kind, w.key) for w in self._waiting).items()
        )

    def _running_seconds(self) -> float:
        """What is left of the running batch."""
        if not self._running:
            return 0.0
        expected = self._costs.seconds(self._running[0].kind, len(self._running))
        return max(expected - (time.monotonic() - self._running_since), 0.0)

    def _seconds(self, kind: WorkKind, count: int) -> float:
        """Seconds of so many items in batches as large as they may be."""
        full, rest = divmod(count, self._limits.max_size)
        return full * self._costs.seconds(kind, self._limits.max_size) + (
            self._costs.seconds(kind, rest) if rest else 0
        )

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
        if remaining <= 0 or len(self._alike(oldest)) >= self._limits.max_size:
            return True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), remaining)
        return False  # the oldest item may have been cancelled meanwhile

    def _alike(self, item: _Waiting[Item, Result]) -> list[_Waiting[Item, Result]]:
        """Those that may share a batch with an item, itself included, oldest first."""
        return [waiting for waiting in self._waiting if (waiting.kind, waiting.key) == (item.kind, item.key)]

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch = self._alike(self._waiting[0])[: self._limits.max_size]
        self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
        self._changed()
        return batch

    async def _run_batch(self, batch: list[_Waiting[Item, Result]]) -> None:
        started = time.monotonic()
        self._running, self._running_since = batch, started
        self._metrics.batch_size.labels(self._stage).observe(len(batch))
        self._metrics.running.labels(self._stage).set(len(batch))
        try:
            results = await self._run([waiting.item for waiting in batch])
            seconds = time.monotonic() - started
            self._costs.record(batch[0].kind, len(batch), seconds)
            _settle(batch, results, started, seconds)
        except Exception as error:  # the worker loop: every item of the batch gets its error, the loop goes on
            _settle(batch, [error] * len(batch), started, 0.0)
        finally:
            self._running = []
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
