"""Calls that must not fall silent: a frozen process keeps its connection and says nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

Answer = TypeVar("Answer")
_LOOK_SECONDS = 0.5
# If this process was the one that stood still, the answer is here and only has to be taken.
_LAST_LOOK_SECONDS = 0.1


class SilenceError(Exception):
    """Nothing came for too long."""


async def answer_within(
    answer: Awaitable[Answer], seconds: float, is_lost: Callable[[], bool] = lambda: False
) -> Answer:
    """The answer, if it comes in time and its sender is not lost meanwhile; otherwise it is cancelled.

    Raises:
        SilenceError: it did not come.
    """
    task = asyncio.ensure_future(answer)
    give_up = time.monotonic() + seconds
    try:
        while (left := give_up - time.monotonic()) > 0 and not is_lost():
            if (await asyncio.wait((task,), timeout=min(left, _LOOK_SECONDS)))[0]:
                return task.result()
        if (await asyncio.wait((task,), timeout=_LAST_LOOK_SECONDS))[0]:
            return task.result()
        raise SilenceError
    finally:
        task.cancel()


async def events_within(
    call: grpc.aio.UnaryStreamCall[Any, Answer], seconds: float, is_lost: Callable[[], bool] = lambda: False
) -> AsyncGenerator[Answer, None]:
    """The responses of a stream that are never further apart than so many seconds. Closing it cancels the call.

    Raises:
        SilenceError: nothing came for that long, or its sender is lost.
        grpc.aio.AioRpcError: the call failed.
    """
    try:
        while True:
            event = await answer_within(call.read(), seconds, is_lost)
            if event is grpc.aio.EOF:
                return
            yield event  # type: ignore[misc]  # EOF is told by identity, which narrows nothing
    finally:
        call.cancel()
