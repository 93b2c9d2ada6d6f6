"""One thread for one device: the event loop never computes, and a device never runs two things at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

Result = TypeVar("Result")


class DeviceExecutor:
    """Runs functions one after the other on a thread of its own, with the caller's context variables."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, function: Callable[[], Result]) -> Result:
        """The function's result; the event loop goes on meanwhile. A function that has started is not interrupted."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, copy_context().run, function)

    def close(self) -> None:
        """Wait for the running function, drop the waiting ones, end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
