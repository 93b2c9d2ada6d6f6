"""The requests that the gateway knows: those that run, and the finished ones whose results are kept for a while.

A request with an idempotency key runs once: a repeated call with the key (of that tenant) reads the first one's
journal. When all its calls are gone, its work goes on for a while, so that a client can come back; then it is
cancelled. A result is kept for some time after the end, and so is an error that would come again. An error that
another try could avoid (a stage was not there, the queue was full, time was up), a refusal before anything was
started, and a cancelled request are forgotten at once: the key is free again.

A request without a key ends with its call.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from gateway.journal import Journal
from gateway.report import Emit
from gateway.run import Run, digest, outcome
from gateway.settings import GatewaySettings
from safelight.errors import (
    DeadlineExceededError,
    FingerprintMismatchError,
    InvalidRequestError,
    LeaseExpiredError,
    OverloadedError,
    RequestCancelledError,
    StageUnavailableError,
    TensorCorruptError,
)
from safelight.v1.generation_service_pb2 import GenerateRequest, GenerateResponse
from safelight.v1.work_pb2 import WorkContext
from services.common.metrics import Metrics

MAX_KEY_BYTES = 256
_LARGE_BYTES = 1024 * 1024
Work = Callable[[GenerateRequest, float | None, Emit], Coroutine[Any, Any, None]]
_PASSING = (
    DeadlineExceededError,
    FingerprintMismatchError,
    LeaseExpiredError,
    OverloadedError,
    RequestCancelledError,
    StageUnavailableError,
    TensorCorruptError,
)


@dataclass
class Requests:
    """Starts requests, attaches calls to them, cancels and forgets them. Confined to the event loop.

    Args:
        work: makes what a request asks for; gets the request, the time left to it, and who takes its events.
        settings: how long, and how much, is kept.
        metrics: where the bytes kept are shown.
    """

    work: Work
    settings: GatewaySettings
    metrics: Metrics
    _by_key: dict[tuple[str, str], Run] = field(default_factory=dict)
    _running: set[Run] = field(default_factory=set)
    _finished: dict[Run, None] = field(default_factory=dict)  # oldest first
    _journal_bytes: int = 0

    async def attach(
        self, request: GenerateRequest, remaining_seconds: float | None
    ) -> AsyncGenerator[GenerateResponse, None]:
        """The events of a request; it is started unless it runs, or has run, already.

        Args:
            request: what to make.
            remaining_seconds: time left to the call; None: no limit.

        Raises:
            SafelightError: of the kinds that GenerationService.Generate documents.
        """
        _check(request)
        asked = await _digest(request)
        run, after = self._find(request, asked), request.after_sequence
        if run is None:
            run, after = self._start(request, asked, remaining_seconds), 0
        run.calls += 1
        if not run.journal.ended:
            run.stop_timer()  # somebody came back
        try:
            async with aclosing(run.journal.read(after)) as events:
                async for event in events:
                    yield event
        finally:
            run.calls -= 1
            self._left(run)

    def cancel(self, context: WorkContext) -> None:
        """Stop the requests that a context names, by its idempotency key or else by its request id.

        Raises:
            InvalidRequestError: it has neither.
        """
        if not (context.idempotency_key or context.request_id):
            raise InvalidRequestError.of("context", "names no request; give its idempotency_key or its request_id")
        for run in [run for run in self._running if run.is_named_by(context)]:
            self._stop(run)

    async def close(self) -> None:
        """Stop everything."""
        tasks = [run.task for run in self._running if run.task is not None]
        for run in [*self._running, *self._finished]:
            run.stop_timer()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for run in list(self._finished):
            self._forget(run)

    def _find(self, request: GenerateRequest, asked: bytes) -> Run | None:
        """The request that this one repeats."""
        context = request.context
        if not context.idempotency_key:
            return None
        run = self._by_key.get((context.tenant, context.idempotency_key))
        if run is not None and run.digest != asked:
            raise InvalidRequestError.of(
                "context.idempotency_key", "belongs to another request; give every new request a key of its own"
            )
        return run

    def _start(self, request: GenerateRequest, asked: bytes, remaining_seconds: float | None) -> Run:
        own = GenerateRequest()
        own.CopyFrom(request)
        own.context.request_id = request.context.request_id or uuid.uuid4().hex
        keyed = bool(own.context.idempotency_key)
        run = Run(own.context, asked, Journal(keyed, self._resized))
        self._running.add(run)
        if keyed:
            self._by_key[run.key] = run
            remaining_seconds = None  # it outlives its call; context.deadline bounds the work
        work = self.work(own, remaining_seconds, run.journal.append)
        run.task = asyncio.create_task(work, name=f"request-{own.context.request_id}")
        run.task.add_done_callback(lambda task: self._ended(run, task))
        return run

    def _stop(self, run: Run) -> None:
        """Cancel a request's work; its key is free from here on."""
        self._free_key(run)
        if run.task is not None:
            run.task.cancel()

    def _ended(self, run: Run, task: asyncio.Task[None]) -> None:
        error = outcome(task)
        run.journal.end(error)
        run.stop_timer()
        self._running.discard(run)
        self._finished[run] = None
        if not run.context.idempotency_key or not run.journal.accepted or isinstance(error, _PASSING):
            self._free_key(run)
        run.timer = asyncio.get_running_loop().call_later(self.settings.journal_seconds, self._expire, run)
        self._left(run)
        self._make_room()

    def _left(self, run: Run) -> None:
        """Act on a request that no call is attached to any more."""
        if run.calls:
            return
        if run.journal.ended:
            if self._by_key.get(run.key) is not run:
                self._forget(run)  # nobody can come back for it
        elif run.context.idempotency_key:
            run.timer = asyncio.get_running_loop().call_later(self.settings.reattach_seconds, self._stop, run)
        else:
            self._stop(run)

    def _make_room(self) -> None:
        """Drop the oldest results until the others fit; those that are being read last, the newest one never."""
        if self._journal_bytes <= self.settings.journal_bytes:
            return
        excess = sum(run.journal.size for run in self._finished) - self.settings.journal_bytes
        oldest_first = list(self._finished)[:-1]
        for run in sorted(oldest_first, key=lambda run: run.calls > 0):
            if excess <= 0:
                return
            excess -= run.journal.size
            self._forget(run)

    def _expire(self, run: Run) -> None:
        """A result has been kept long enough; calls that still read it go on."""
        self._free_key(run)
        if not run.calls:
            self._forget(run)

    def _forget(self, run: Run) -> None:
        """Keep nothing of a finished request."""
        run.stop_timer()
        run.journal.drop()
        self._finished.pop(run, None)
        self._free_key(run)

    def _free_key(self, run: Run) -> None:
        if self._by_key.get(run.key) is run:
            del self._by_key[run.key]

    def _resized(self, change: int) -> None:
        self._journal_bytes += change
        self.metrics.journal_bytes.inc(change)


async def _digest(request: GenerateRequest) -> bytes:
    """The request's digest, which only one with a key needs; the event loop goes on while that of a film is made."""
    if not request.context.idempotency_key:
        return b""
    return digest(request) if request.ByteSize() < _LARGE_BYTES else await asyncio.to_thread(digest, request)


def _check(request: GenerateRequest) -> None:
    """Raises InvalidRequestError if the request's name is too long, or asks for events that it has no name for."""
    size = len(request.context.idempotency_key.encode())
    if size > MAX_KEY_BYTES:
        raise InvalidRequestError.of("context.idempotency_key", f"has {size} bytes; must have at most {MAX_KEY_BYTES}")
    if request.after_sequence < 0:
        raise InvalidRequestError.of("after_sequence", f"is {request.after_sequence}; must be 0 or more")
    if request.after_sequence and not request.context.idempotency_key:
        raise InvalidRequestError.of("after_sequence", "needs the context.idempotency_key of the first call")
