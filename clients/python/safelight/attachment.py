"""A request that is held on to: when its connection breaks, it is taken up again where it was."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

import grpc

from safelight.errors import InternalError
from safelight.event_reader import EventReader
from safelight.link import Link, is_answer
from safelight.retry import Retries
from safelight.types import Event, GenerationResult
from safelight.v1 import generation_service_pb2 as pb
from safelight.v1 import work_pb2

CANCEL_SECONDS = 1.0
"""Longest time that a request's end waits for the gateway to hear of it."""

_log = logging.getLogger("safelight.client")

Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]


class Attachment:
    """One request at a gateway, until its result or its error is there.

    Args:
        link: to the gateway.
        request: with an idempotency key.
        retries: how often it may be sent.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        link: Link,
        request: pb.GenerateRequest,
        retries: Retries,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._link = link
        self._request = request  # its after_sequence is the number of the last event that has come
        self._retries = retries
        self._sleep = sleep
        self._reader = EventReader()
        self._call: Call | None = None
        self._may_run = True
        self._closed = False

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens to the request, none missed and none twice; when the gateway has lost it, all of it anew.

        Raises:
            SafelightError: see safelight.errors.
        """
        try:
            while True:
                try:
                    async for response in self._send():
                        event = self._take(response)
                        if event is not None:
                            yield event
                    return
                except grpc.aio.AioRpcError as error:
                    if not self._may_run:  # the result is there; only its call has not ended well
                        return
                    wait = self._wait_after(error)
                await self._sleep(wait)
        finally:
            await self.close()

    async def close(self) -> None:
        """End the call, and the work with it; waits for the gateway no longer than CANCEL_SECONDS. May be repeated."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()
        if not self._may_run:
            return
        self._may_run = False
        own = self._request.context
        context = work_pb2.WorkContext(tenant=own.tenant, idempotency_key=own.idempotency_key)
        with suppress(grpc.aio.AioRpcError):  # a gateway that is gone does no work
            await self._link.generation.Cancel(pb.CancelRequest(context=context), timeout=CANCEL_SECONDS)

    def _send(self) -> Call:
        if self._closed:
            raise asyncio.CancelledError("the client has been closed")
        self._may_run = True
        self._call = self._link.generation.Generate(self._request, timeout=self._retries.remaining_seconds())
        return self._call

    def _take(self, response: pb.GenerateResponse) -> Event | None:
        """The event of a response; None if it only brought a piece of a file."""
        self._link.has_answered = True
        self._retries.note_event()
        if response.sequence == 1 and self._request.after_sequence:
            self._retries.note_restart()
            self._begin_anew()
        if response.sequence != self._request.after_sequence + 1:
            raise InternalError(f"event {response.sequence} came after event {self._request.after_sequence}")
        self._request.after_sequence = response.sequence
        event = self._reader.read(response)
        self._may_run = not isinstance(event, GenerationResult)
        return event

    def _wait_after(self, error: grpc.aio.AioRpcError) -> float:
        """Seconds until the request is sent again.

        Raises:
            SafelightError: it shall not be sent again.
        """
        known = self._link.explained(error)
        if self._link.is_lost(error):
            wait = self._retries.after_loss(known)
        else:
            self._note_answer(is_answer(error))
            wait = self._retries.after_refusal(known)
            self._begin_anew()
        _log.info("trying again in %.2f s: %s", wait, known.message)
        return wait

    def _note_answer(self, answered: bool) -> None:
        self._may_run = not answered
        self._link.has_answered |= answered

    def _begin_anew(self) -> None:
        self._reader, self._request.after_sequence = EventReader(), 0
