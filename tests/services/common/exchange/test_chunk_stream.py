"""Laws of the chunk stream: it is protobuf on the wire, goes on where it broke, and gets in nobody's way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.errors import LeaseExpiredError, StageUnavailableError, TensorCorruptError
from safelight.v1.tensor_exchange_service_pb2 import PullRequest, PullResponse, ReleaseRequest, ReleaseResponse
from safelight.v1.tensor_exchange_service_pb2_grpc import (
    TensorExchangeServiceServicer,
    TensorExchangeServiceStub,
    add_TensorExchangeServiceServicer_to_server,
)
from safelight.v1.tensor_pb2 import TensorLease
from services.common.channels import ChannelPool
from services.common.exchange import chunk_stream, digest
from services.common.exchange.chunk_stream import ATTEMPTS, CHUNK_BYTES, ChunkStream, read_chunk, write_chunk
from services.common.metrics import Metrics
from services.common.request_context import Context
from services.common.server import Service
from tests.serving import Serve

DATA = random.Random(0).randbytes(3 * CHUNK_BYTES + 5)
sizes = pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**21])


class Holder(TensorExchangeServiceServicer):
    """Holds DATA; its first streams break after some chunks. Remembers what was asked for, and by which connection."""

    def __init__(self, *breaks: int) -> None:
        self.breaks = list(breaks)
        self.offsets: list[int] = []
        self.peers: dict[str, set[str]] = {"Pull": set(), "Release": set()}
        self.stalls = False
        self.stalled = asyncio.Event()

    async def Pull(self, request: PullRequest, context: Context) -> AsyncIterator[PullResponse]:
        self.peers["Pull"].add(context.peer())
        self.offsets.append(request.offset)
        chunks = self.breaks.pop(0) if self.breaks else len(DATA)
        for start in range(request.offset, len(DATA), CHUNK_BYTES):
            if chunks == 0:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            chunks -= 1
            yield PullResponse(data=DATA[start : start + CHUNK_BYTES])
            if self.stalls:
                self.stalled.set()
                await asyncio.Event().wait()

    async def Release(self, request: ReleaseRequest, context: Context) -> ReleaseResponse:
        self.peers["Release"].add(context.peer())
        return ReleaseResponse()


class Consumer:
    """A stream from one holder."""

    def __init__(self, address: str, channels: ChannelPool) -> None:
        self.channels, self.metrics = channels, Metrics()
        self.lease = TensorLease(endpoint=address, ticket="0f3a")
        self.buffer = memoryview(bytearray(len(DATA)))

    async def pull(self) -> bytes:
        return await ChunkStream(self.channels, self.metrics).pull(self.lease, self.buffer, "latents")

    @property
    def continued(self) -> float | None:
        return self.metrics.registry.get_sample_value("safelight_pulls_continued_total")


@pytest.fixture
async def channels() -> AsyncIterator[ChannelPool]:
    pool = ChannelPool()
    yield pool
    await pool.close()


async def consumer_of(holder: Holder, serve: Serve, channels: ChannelPool) -> Consumer:
    running = await serve(
        Service("holder", {"x": lambda server: add_TensorExchangeServiceServicer_to_server(holder, server)})
    )
    return Consumer(running.server.address, channels)


@sizes
def test_a_chunk_is_what_protobuf_would_write(size: int) -> None:
    message = write_chunk(memoryview(bytes(size)))
    assert PullResponse.FromString(message) == PullResponse(data=bytes(size))
    assert message == PullResponse(data=bytes(size)).SerializeToString() or size == 0


@sizes
def test_what_protobuf_writes_is_read(size: int) -> None:
    assert read_chunk(PullResponse(data=bytes(size)).SerializeToString()) == bytes(size)


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (b"", b""),
        (b"\x0a\x02ab\x0a\x01c", b"c"),
        (b"\x10\x05\x0a\x01c", b"c"),
        (b"\x0a\x81\x00c", b"c"),
        (b"\x0a\x01c\x10\x05", b"c"),
    ],
    ids=["empty", "field twice", "unknown field first", "longer varint", "unknown field last"],
)
def test_every_valid_encoding_is_read(message: bytes, data: bytes) -> None:
    assert bytes(read_chunk(message)) == data


@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda rest: b"\x0a" + rest))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(message: bytes) -> None:
    try:
        read = bytes(read_chunk(message))
    except TensorCorruptError:
        read = None
    try:
        expected = PullResponse.FromString(message).data
    except Exception:  # protobuf's own class, whichever implementation runs
        expected = None
    assert read == expected


async def test_a_broken_pull_goes_on_from_where_it_broke(serve: Serve, channels: ChannelPool) -> None:
    holder = Holder(1, 2)
    consumer = await consumer_of(holder, serve, channels)
    assert await consumer.pull() == digest(DATA)
    assert bytes(consumer.buffer) == DATA
    assert holder.offsets == [0, CHUNK_BYTES, 3 * CHUNK_BYTES]
    assert consumer.continued == 2


async def test_a_pull_that_keeps_breaking_is_an_unavailable_stage(serve: Serve, channels: ChannelPool) -> None:
    holder = Holder(*[0] * 100)
    consumer = await consumer_of(holder, serve, channels)
    with pytest.raises(StageUnavailableError, match=r"latents: its holder at .* can't be reached"):
        await consumer.pull()
    assert holder.offsets == [0] * ATTEMPTS


async def test_a_lease_that_has_expired_is_not_asked_for_again(serve: Serve, channels: ChannelPool) -> None:
    class Forgetful(Holder):
        async def Pull(self, request: PullRequest, context: Context) -> AsyncIterator[PullResponse]:
            self.offsets.append(request.offset)
            raise LeaseExpiredError("gone", ticket=request.ticket)
            yield PullResponse()

    holder = Forgetful()
    consumer = await consumer_of(holder, serve, channels)
    with pytest.raises(LeaseExpiredError):
        await consumer.pull()
    assert holder.offsets == [0]


@pytest.mark.parametrize("endpoint", ["", "no target", "x:y:z", "unix:", "a server of something else"])
async def test_an_endpoint_that_holds_no_tensors_is_an_unavailable_stage(
    serve: Serve, channels: ChannelPool, endpoint: str
) -> None:
    other = await serve(Service("other", {}))
    consumer = Consumer(other.server.address if endpoint.startswith("a server") else endpoint, channels)
    with pytest.raises(StageUnavailableError, match="latents: its holder at"):
        await consumer.pull()


async def test_a_holder_that_falls_silent_is_an_unavailable_stage(
    serve: Serve, channels: ChannelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_stream, "SILENCE_SECONDS", 0.2)
    holder = Holder()
    holder.stalls = True
    consumer = await consumer_of(holder, serve, channels)
    with pytest.raises(StageUnavailableError, match="has gone silent"):
        await consumer.pull()


async def test_a_call_does_not_share_a_connection_with_a_tensor(serve: Serve, channels: ChannelPool) -> None:
    holder = Holder()
    holder.stalls = True
    consumer = await consumer_of(holder, serve, channels)
    pulling = asyncio.create_task(consumer.pull())
    await holder.stalled.wait()
    stub = TensorExchangeServiceStub(channels.get(consumer.lease.endpoint))
    await stub.Release(ReleaseRequest(tickets=["0f3a"]), timeout=5)
    assert not pulling.done()
    assert len(holder.peers["Pull"] | holder.peers["Release"]) == 2
    pulling.cancel()
    await asyncio.gather(pulling, return_exceptions=True)
