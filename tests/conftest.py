"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from services.common.channels import open_channel
from services.common.metrics import Metrics
from services.common.server import Server, Service
from services.common.settings import ServerSettings
from tests.serving import AT_ONCE, Running, Serve


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tests compute on tiny tensors: more threads only wait for each other."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts services; see `tests.serving.Serve`."""
    async with AsyncExitStack() as stack:

        async def start(service: Service, settings: ServerSettings = AT_ONCE) -> Running:
            server = Server(service, settings, Metrics())
            await server.start()
            stack.push_async_callback(server.stop)
            channel = open_channel(server.address)
            stack.push_async_callback(channel.close)
            return Running(server, channel)

        yield start
