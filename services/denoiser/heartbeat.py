"""Signs of life in a stream: whoever waits for a silent denoiser can tell a long step from a frozen process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from google.protobuf.timestamp_pb2 import Timestamp

from safelight.v1.denoiser_service_pb2 import DenoiseResponse, Heartbeat


async def with_heartbeats(
    events: AsyncGenerator[DenoiseResponse, None], seconds: float
) -> AsyncGenerator[DenoiseResponse, None]:
    """The events, and a heartbeat wherever none came for so many seconds. Closing it closes `events`."""
    async with aclosing(events):
        while True:
            upcoming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait((upcoming,), timeout=seconds))[0]:
                    yield _heartbeat()
            finally:  # if closed or cancelled meanwhile: a generator can't be closed while it runs
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)
            event = upcoming.result()
            if event is None:
                return
            yield event


def _heartbeat() -> DenoiseResponse:
    now = Timestamp()
    now.GetCurrentTime()
    return DenoiseResponse(heartbeat=Heartbeat(time=now))
