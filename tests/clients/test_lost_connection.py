"""The whole way, with a wire that is cut: a real stack behind a proxy that drops its connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from safelight import Accepted, AsyncClient, Event, GenerationOptions, GenerationResult, Progress

OPTIONS = GenerationOptions(prompt="a cat", steps=12, width=64, height=64, seed=3, determinism="exact")
PATIENCE_SECONDS = 60.0


class Wire:
    """A proxy to a unix socket whose connections can be cut."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ends: set[asyncio.StreamWriter] = set()
        self.cuts = 0

    def cut(self) -> None:
        """Drop every connection, as a cable that is pulled."""
        self.cuts += 1
        for end in self._ends:
            end.transport.abort()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it is cut or closed."""
        far_reader, far_writer = await asyncio.open_unix_connection(self._path)
        ends = {writer, far_writer}
        self._ends |= ends
        try:
            await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer), return_exceptions=True)
        finally:
            self._ends -= ends


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


@asynccontextmanager
async def wire_to(endpoint: str) -> AsyncIterator[tuple[Wire, str]]:
    """A wire, and the address of its near end."""
    wire = Wire(endpoint.removeprefix("unix:"))
    server = await asyncio.start_server(wire.connect, "127.0.0.1", 0)
    try:
        yield wire, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        wire.cut()
        await server.wait_closed()


def progress_of(events: Sequence[Event]) -> list[Progress]:
    return [event for event in events if isinstance(event, Progress)]


@pytest.mark.parametrize("every", [1, 5])
async def test_a_wire_that_is_cut_again_and_again_costs_no_event_and_no_second_run(every: int, endpoint: str) -> None:
    events: list[Event] = []
    async with wire_to(endpoint) as (wire, address), AsyncClient(address) as client:
        async for event in client.stream(OPTIONS, timeout_seconds=PATIENCE_SECONDS):
            events.append(event)
            if len(events) % every == 0:
                wire.cut()
    async with AsyncClient(endpoint) as client:
        undisturbed = [event async for event in client.stream(OPTIONS)]
    assert progress_of(events) == progress_of(undisturbed)
    assert wire.cuts > 2
    assert [type(event) for event in events].count(Accepted) == 1
    last, expected = events[-1], undisturbed[-1]
    assert isinstance(last, GenerationResult)
    assert isinstance(expected, GenerationResult)
    assert last.images[0].data == expected.images[0].data
    assert last.images[0].steps == OPTIONS.steps


async def test_a_process_that_comes_back_with_its_key_gets_the_first_run_s_result(endpoint: str) -> None:
    async with AsyncClient(endpoint) as first:
        made = await first.generate("a cat", steps=2, width=64, height=64, idempotency_key="once")
    async with AsyncClient(endpoint) as second:
        again = await second.generate("a cat", steps=2, width=64, height=64, idempotency_key="once")
    assert (again.request_id, again.images[0].seed) == (made.request_id, made.images[0].seed)
    assert again.images[0].data == made.images[0].data
