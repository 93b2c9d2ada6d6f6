"""Calls that must not fall silent: a frozen process keeps its connection and says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import grpc

Answer = TypeVar("Answer")
# If this process was the one that stood still, the answer is here and only has to be taken.
_LAST_LOOK_SECONDS = 0.1


class SilenceError(Exception):
    """Nothing came for too long."""


async def answer_within(answer: Awaitable[Answer], seconds: float) -> Answer:
    """The answer, if it comes in time; otherwise it is cancelled.

    Raises:
        SilenceError: it did not.
    """
    task = asyncio.ensure_future(answer)
    try:
        for patience in (seconds, _LAST_LOOK_SECONDS):
            if (await asyncio.wait((task,), timeout=patience))[0]:
                return task.result()
        raise SilenceError
    finally:
        task.cancel()


async def events_within(call: grpc.aio.UnaryStreamCall[Any, Answer], seconds: float) -> AsyncGenerator[Answer, None]:
    """The responses of a stream that are never further apart than so many seconds. Closing it cancels the call.

    Raises:
        SilenceError: nothing came for that long.
        grpc.aio.AioRpcError: the call failed.
    """
    try:
        while True:
            event = await answer_within(call.read(), seconds)
            if event is grpc.aio.EOF:
                return
            yield event  # type: ignore[misc]  # EOF is told by identity, which narrows nothing
    finally:
        call.cancel()
