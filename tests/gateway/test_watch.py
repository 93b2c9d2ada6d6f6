"""A call that falls silent is given up; one whose answer is only late to be looked at is not."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from gateway.watch import SilenceError, answer_within


async def test_an_answer_in_time_is_the_answer() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 7

    assert await answer_within(answer(), 5.0) == 7


async def test_an_answer_that_does_not_come_is_cancelled() -> None:
    silent: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(SilenceError):
        await answer_within(silent, 0.01)
    assert silent.cancelled()


async def test_the_sender_of_an_answer_may_be_lost_before_time_is_up() -> None:
    silent: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(SilenceError):
        await answer_within(silent, 3600.0, lambda: True)


async def test_a_process_that_stood_still_itself_takes_the_answer_that_lies_there() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    theirs.send(b"x")
    waiting = asyncio.ensure_future(answer_within(reader.readexactly(1), 0.05))
    asyncio.get_running_loop().call_soon(time.sleep, 0.2)  # the process stands still
    assert await waiting == b"x"
    writer.close()
    theirs.close()


async def test_what_the_call_failed_with_is_raised() -> None:
    async def answer() -> None:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        await answer_within(answer(), 5.0)
