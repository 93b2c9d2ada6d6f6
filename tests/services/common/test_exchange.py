"""Laws of the hand-off by reference: small tensors ride inline, large ones wait under a lease."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from safelight.errors import (
    InvalidRequestError,
    LeaseExpiredError,
    OutOfMemoryError,
    StageUnavailableError,
    TensorCorruptError,
)
from safelight.tensors import MAX_INLINE_BYTES
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.tensor_exchange_service_pb2 import PullRequest, PullResponse, ReleaseRequest, ReleaseResponse
from safelight.v1.tensor_exchange_service_pb2_grpc import (
    TensorExchangeServiceServicer,
    TensorExchangeServiceStub,
    add_TensorExchangeServiceServicer_to_server,
)
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorLease, TensorRef
from services.common.channels import ChannelPool
from services.common.exchange import CHUNK_BYTES, BytesPayload, TensorReader, TensorStore
from services.common.metrics import Metrics
from services.common.request_context import Context
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Running, Serve, failure

MIB = 1024 * 1024


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Process:
    """What one stage's process has: its leases, a server for them, and a reader of other stages' references."""

    store: TensorStore
    reader: TensorReader
    metrics: Metrics
    clock: Clock
    running: Running

    @property
    def leases(self) -> float | None:
        return self.metrics.registry.get_sample_value("safelight_leases")

    def received(self, path: str) -> float:
        return self.metrics.registry.get_sample_value("safelight_tensor_bytes_total", {"path": path}) or 0


StartProcess = Callable[[], Awaitable[Process]]


@pytest.fixture
async def start_process(serve: Serve) -> AsyncIterator[StartProcess]:
    pools: list[ChannelPool] = []

    async def start() -> Process:
        metrics, clock, channels = Metrics(), Clock(), ChannelPool()
        pools.append(channels)
        store = TensorStore(60.0, metrics, clock)
        running = await serve(Service("holder", stage_mounts(store, [], GetLoadResponse)))
        store.advertise(running.server.address)
        return Process(store, TensorReader(store, channels, 16 * MIB, metrics), metrics, clock, running)

    yield start
    for pool in pools:
        await pool.close()


def header(size: int) -> TensorHeader:
    return TensorHeader(dtype=DATA_TYPE_UINT8, shape=[size])


async def put(process: Process, size: int) -> tuple[bytes, TensorRef]:
    data = random.Random(size).randbytes(size)
    return data, await process.store.put(header(size), BytesPayload(data))


async def pull(process: Process, ref: TensorRef, offset: int = 0) -> list[bytes]:
    call = TensorExchangeServiceStub(process.running.channel).Pull(PullRequest(ticket=ref.lease.ticket, offset=offset))
    return [response.data async for response in call]


@pytest.mark.parametrize(
    ("size", "location"), [(0, "inline"), (MAX_INLINE_BYTES, "inline"), (MAX_INLINE_BYTES + 1, "lease")]
)
async def test_a_tensor_up_to_64_kib_rides_inline(start_process: StartProcess, size: int, location: str) -> None:
    maker, taker = await start_process(), await start_process()
    data, ref = await put(maker, size)
    payload = await taker.reader.read(ref, "latents")
    assert ref.WhichOneof("location") == location
    assert bytes(payload.buffer()) == data
    assert maker.leases == (0 if location == "inline" else 1)


async def test_in_one_process_the_consumer_takes_the_payload_itself(start_process: StartProcess) -> None:
    process = await start_process()
    payload = BytesPayload(bytes(MIB))
    ref = await process.store.put(header(MIB), payload)
    assert await process.reader.read(ref, "latents") is payload
    assert (process.received("local"), process.received("stream")) == (MIB, 0)


@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, 5 * CHUNK_BYTES + 7])
async def test_another_process_pulls_the_same_bytes(start_process: StartProcess, size: int) -> None:
    maker, taker = await start_process(), await start_process()
    data, ref = await put(maker, size)
    payload = await taker.reader.read(TensorRef.FromString(ref.SerializeToString()), "latents")
    assert bytes(payload.buffer()) == data
    assert taker.received("stream") == size


async def test_bytes_travel_in_chunks_of_one_mib(start_process: StartProcess) -> None:
    maker = await start_process()
    data, ref = await put(maker, 2 * CHUNK_BYTES + 3)
    chunks = await pull(maker, ref)
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 3]
    assert b"".join(chunks) == data


@pytest.mark.parametrize("offset", [1, CHUNK_BYTES, CHUNK_BYTES + 5, 3 * CHUNK_BYTES])
async def test_a_pull_goes_on_from_an_offset(start_process: StartProcess, offset: int) -> None:
    maker = await start_process()
    data, ref = await put(maker, 3 * CHUNK_BYTES)
    assert b"".join(await pull(maker, ref, offset)) == data[offset:]


@pytest.mark.parametrize("offset", [-1, 3 * CHUNK_BYTES + 1])
async def test_an_offset_outside_the_tensor_is_refused(start_process: StartProcess, offset: int) -> None:
    maker = await start_process()
    _, ref = await put(maker, 3 * CHUNK_BYTES)
    error = await failure(pull(maker, ref, offset))
    assert type(error) is InvalidRequestError
    assert [violation.field for violation in error.violations] == ["offset"]


async def test_a_pull_may_be_repeated(start_process: StartProcess) -> None:
    maker, taker = await start_process(), await start_process()
    _, ref = await put(maker, MIB)
    first, second = await taker.reader.read(ref, "latents"), await taker.reader.read(ref, "latents")
    assert first.buffer() == second.buffer()


async def test_release_ends_leases_and_may_be_repeated(start_process: StartProcess) -> None:
    maker = await start_process()
    tickets = [(await put(maker, size))[1].lease.ticket for size in (MIB, 2 * MIB)]
    stub = TensorExchangeServiceStub(maker.running.channel)
    for _ in range(2):
        await stub.Release(ReleaseRequest(tickets=tickets))
    assert maker.leases == 0


async def test_a_released_tensor_is_a_lease_that_has_expired(start_process: StartProcess) -> None:
    maker, taker = await start_process(), await start_process()
    _, ref = await put(maker, MIB)
    maker.store.release([ref.lease.ticket])
    with pytest.raises(LeaseExpiredError) as caught:
        await taker.reader.read(ref, "latents")
    assert caught.value.metadata == {"ticket": ref.lease.ticket}


async def test_a_lease_ends_at_the_moment_it_names(start_process: StartProcess) -> None:
    maker, taker = await start_process(), await start_process()
    _, ref = await put(maker, MIB)
    maker.clock.now = ref.lease.expires_at.ToNanoseconds() / 1e9 - 0.001
    await taker.reader.read(ref, "latents")
    maker.clock.now += 0.001
    with pytest.raises(LeaseExpiredError):
        await taker.reader.read(ref, "latents")


async def test_an_expired_lease_ends_the_same_in_process(start_process: StartProcess) -> None:
    process = await start_process()
    _, ref = await put(process, MIB)
    process.clock.now += 60.0
    with pytest.raises(LeaseExpiredError):
        await process.reader.read(ref, "latents")


async def test_what_nobody_fetches_is_dropped_without_a_further_call() -> None:
    metrics = Metrics()
    store = TensorStore(0.01, metrics)
    await store.put(header(MIB), BytesPayload(bytes(MIB)))
    await asyncio.sleep(0.03)
    assert metrics.registry.get_sample_value("safelight_leased_bytes") == 0


async def test_the_bytes_held_are_counted(start_process: StartProcess) -> None:
    process = await start_process()
    for size in (MIB, 2 * MIB):
        await put(process, size)
    assert process.metrics.registry.get_sample_value("safelight_leased_bytes") == 3 * MIB


async def test_an_unknown_ticket_is_a_lease_that_has_expired(start_process: StartProcess) -> None:
    maker, taker = await start_process(), await start_process()
    lease = TensorLease(endpoint=maker.running.server.address, exchange_id=maker.store.exchange_id, ticket="0f3a")
    with pytest.raises(LeaseExpiredError):
        await taker.reader.read(TensorRef(header=header(MIB), lease=lease), "latents")


@pytest.mark.parametrize("size", [9, MIB])
async def test_bytes_that_do_not_match_their_digest_are_refused(start_process: StartProcess, size: int) -> None:
    maker, taker = await start_process(), await start_process()
    _, ref = await put(maker, size)
    ref.header.digest = bytes(8)
    with pytest.raises(TensorCorruptError, match="latents: the bytes do not match their digest") as caught:
        await taker.reader.read(ref, "latents")
    assert caught.value.metadata == {"field": "latents"}


@pytest.mark.parametrize(
    ("promised", "sentence"),
    [(3 * MIB, f"latents: {2 * MIB} of {3 * MIB} bytes arrived"), (MIB, f"latents: more bytes arrived than the {MIB}")],
)
async def test_a_stream_of_another_length_than_the_header_is_refused(
    start_process: StartProcess, promised: int, sentence: str
) -> None:
    maker, taker = await start_process(), await start_process()
    _, ref = await put(maker, 2 * MIB)
    ref.header.shape[:] = [promised]
    with pytest.raises(TensorCorruptError, match=sentence) as caught:
        await taker.reader.read(ref, "latents")
    assert caught.value.metadata == {"field": "latents"}


@pytest.mark.parametrize(
    ("ref", "sentence"),
    [
        (TensorRef(header=header(8), inline=b"four"), "latents: shape .* needs 8 bytes, not 4"),
        (TensorRef(header=header(8)), "latents: the reference has neither bytes nor a lease"),
        (TensorRef(), "latents: dtype 0 is not one"),
        (TensorRef(header=header(-1), inline=b""), "latents: shape .* none negative"),
        (TensorRef(header=header(16 * MIB + 1), lease=TensorLease(endpoint="127.0.0.1:1")), "more than the 16777216"),
        (TensorRef(header=header(2**62), lease=TensorLease(endpoint="127.0.0.1:1")), "more than the 16777216"),
    ],
    ids=["cut short", "nowhere", "no dtype", "negative", "over the limit", "far over the limit"],
)
async def test_a_bad_reference_is_refused_before_anything_is_fetched(
    start_process: StartProcess, ref: TensorRef, sentence: str
) -> None:
    process = await start_process()
    with pytest.raises(TensorCorruptError, match=sentence) as caught:
        await process.reader.read(ref, "latents")
    assert caught.value.metadata == {"field": "latents"}


async def test_a_tensor_that_memory_has_no_room_for_is_refused_by_name(start_process: StartProcess) -> None:
    process = await start_process()
    reader = TensorReader(process.store, ChannelPool(), 2**60, process.metrics)
    ref = TensorRef(header=header(2**50), lease=TensorLease(endpoint="127.0.0.1:1"))
    with pytest.raises(OutOfMemoryError, match="latents: 1125899906842624 bytes"):
        await reader.read(ref, "latents")


async def test_a_header_that_does_not_fit_its_payload_is_never_put(start_process: StartProcess) -> None:
    process = await start_process()
    with pytest.raises(TensorCorruptError):
        await process.store.put(header(MIB), BytesPayload(bytes(MIB - 1)))
    assert process.leases == 0


async def test_a_holder_that_is_gone_is_an_unavailable_stage(start_process: StartProcess) -> None:
    maker, taker = await start_process(), await start_process()
    _, ref = await put(maker, MIB)
    await maker.running.server.stop()
    with pytest.raises(StageUnavailableError) as caught:
        await taker.reader.read(ref, "latents")
    assert caught.value.metadata == {"endpoint": maker.running.server.address}


class StallingHolder(TensorExchangeServiceServicer):
    """Sends one chunk of a tensor and no more."""

    def __init__(self) -> None:
        self.sent_one = asyncio.Event()

    async def Pull(self, request: PullRequest, context: Context) -> AsyncIterator[PullResponse]:
        yield PullResponse(data=bytes(CHUNK_BYTES))
        self.sent_one.set()
        await asyncio.Event().wait()

    async def Release(self, request: ReleaseRequest, context: Context) -> ReleaseResponse:
        return ReleaseResponse()


async def test_a_holder_that_stops_in_the_middle_is_an_unavailable_stage(
    serve: Serve, start_process: StartProcess
) -> None:
    holder = StallingHolder()
    running = await serve(
        Service("holder", {"x": lambda server: add_TensorExchangeServiceServicer_to_server(holder, server)})
    )
    taker = await start_process()
    lease = TensorLease(endpoint=running.server.address, exchange_id="another", ticket="0f3a")
    reading = asyncio.create_task(taker.reader.read(TensorRef(header=header(3 * MIB), lease=lease), "latents"))
    await holder.sent_one.wait()
    await running.server.stop()
    with pytest.raises(StageUnavailableError):
        await reading
