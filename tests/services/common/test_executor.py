"""Laws of the device's thread: one thing at a time, in the caller's context, while the event loop goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from services.common.executor import DeviceExecutor
from services.common.request_context import request_id


@pytest.fixture
def executor() -> Iterator[DeviceExecutor]:
    executor = DeviceExecutor("device")
    yield executor
    executor.close()


async def test_the_event_loop_goes_on_while_a_function_runs(executor: DeviceExecutor) -> None:
    """The function waits for the loop, which would be a deadlock if the loop waited for it."""
    released = threading.Event()
    running = asyncio.create_task(executor.run(lambda: released.wait(5)))
    await asyncio.sleep(0)
    released.set()
    assert await running is True


async def test_functions_run_one_after_the_other_in_order_of_arrival_on_one_thread(executor: DeviceExecutor) -> None:
    inside: list[str] = []

    def function() -> tuple[int, str]:
        inside.append("in")
        inside.append("out")
        return len(inside), threading.current_thread().name

    results = await asyncio.gather(*(executor.run(function) for _ in range(20)))
    assert [number for number, _ in results] == list(range(2, 42, 2))
    assert {name for _, name in results} == {"device_0"}


async def test_a_function_sees_the_caller_s_request_id(executor: DeviceExecutor) -> None:
    async def run_as(name: str) -> str:
        request_id.set(name)
        return await executor.run(request_id.get)

    one, two = await asyncio.gather(run_as("one"), run_as("two"))
    assert (one, two) == ("one", "two")


async def test_an_exception_is_the_caller_s(executor: DeviceExecutor) -> None:
    with pytest.raises(ZeroDivisionError):
        await executor.run(lambda: 1 // 0)


async def test_closing_waits_for_the_running_function_and_drops_the_others() -> None:
    executor, started, ended = DeviceExecutor("device"), threading.Event(), threading.Event()

    def function() -> None:
        started.set()
        ended.wait(0.05)
        ended.set()

    running = asyncio.create_task(executor.run(function))
    dropped = asyncio.create_task(executor.run(lambda: None))
    await asyncio.to_thread(started.wait)
    executor.close()
    assert ended.is_set()
    await asyncio.wait([running, dropped])
    assert dropped.cancelled()
