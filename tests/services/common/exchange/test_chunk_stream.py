"""Laws of the chunk stream: it goes on where it broke, gives up when it can't, and gets in nobody's way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from safelight.errors import LeaseExpiredError, StageUnavailableError
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.tensor_exchange_service_pb2 import PullRequest, PullResponse, ReleaseRequest, ReleaseResponse
from safelight.v1.tensor_exchange_service_pb2_grpc import (
    TensorExchangeServiceServicer,
    TensorExchangeServiceStub,
    add_TensorExchangeServiceServicer_to_server,
)
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorLease
from services.common.channels import ChannelPool
from services.common.exchange import CHUNK_BYTES, BytesPayload, TensorStore, chunk_stream, digest, servicer
from services.common.exchange.chunk_messages import chunks
from services.common.exchange.chunk_stream import ATTEMPTS, ChunkStream
from services.common.metrics import Metrics
from services.common.request_context import Context
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve

DATA = random.Random(0).randbytes(3 * CHUNK_BYTES + 5)


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


async def test_a_holder_does_not_run_ahead_of_a_slow_consumer(
    serve: Serve, channels: ChannelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def counted(data: memoryview, offset: int) -> Iterator[memoryview]:
        for chunk in chunks(data, offset):
            sent.append(chunk.nbytes)
            yield chunk

    monkeypatch.setattr(servicer, "chunks", counted)
    store = TensorStore(60.0, Metrics())
    running = await serve(Service("holder", stage_mounts(store, [], GetLoadResponse)))
    size = 64 * CHUNK_BYTES
    ref = await store.put(TensorHeader(dtype=DATA_TYPE_UINT8, shape=[size]), BytesPayload(bytes(size)))
    call = TensorExchangeServiceStub(channels.bulk(running.server.address)).Pull(PullRequest(ticket=ref.lease.ticket))
    responses = aiter(call)
    await anext(responses)
    seen = 0
    while seen != len(sent):
        seen = len(sent)
        await asyncio.sleep(0.2)
    assert seen < 32
    assert CHUNK_BYTES + sum([len(response.data) async for response in responses]) == size
