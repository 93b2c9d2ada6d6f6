"""Laws of shared memory: the same bytes without the stream, nothing left behind, and never the only way."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from safelight.errors import LeaseExpiredError, StageUnavailableError
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorRef
from services.common.channels import ChannelPool
from services.common.exchange import BytesPayload, SharedMemoryServer, TensorReader, TensorStore
from services.common.exchange import shared_memory_reader as consumer_side
from services.common.exchange import shared_memory_server as producer_side
from services.common.exchange.host import host_identity, socket_name
from services.common.exchange.shared_memory_server import GREETING, PIECE
from services.common.exchange.slot_pool import SLOT_BYTES, read_slot
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve

pytestmark = pytest.mark.skipif(not host_identity(), reason="the system has no memfd")
MIB = 1024 * 1024
ROOT = Path(__file__).parents[4]


@dataclass(frozen=True)
class Stage:
    """What one process has: leases, served by gRPC and through shared memory, and a reader of others' references."""

    store: TensorStore
    shared_memory: SharedMemoryServer
    reader: TensorReader
    metrics: Metrics

    def received(self, path: str) -> float:
        return self.metrics.registry.get_sample_value("safelight_tensor_bytes_total", {"path": path}) or 0

    @property
    def fallbacks(self) -> float | None:
        return self.metrics.registry.get_sample_value("safelight_shared_memory_fallbacks_total")

    async def put(self, size: int) -> tuple[bytes, TensorRef]:
        data = random.Random(size).randbytes(size)
        return data, await self.store.put(TensorHeader(dtype=DATA_TYPE_UINT8, shape=[size]), BytesPayload(data))


StartStage = Callable[..., Awaitable[Stage]]


@pytest.fixture
async def start(serve: Serve) -> AsyncIterator[StartStage]:
    stages: list[tuple[Stage, ChannelPool]] = []

    async def start_stage(pool_bytes: int = 4 * MIB) -> Stage:
        metrics, channels = Metrics(), ChannelPool()
        store = TensorStore(60.0, metrics)
        stage = Stage(
            store, SharedMemoryServer(store, pool_bytes), TensorReader(store, channels, 2**30, metrics), metrics
        )
        stages.append((stage, channels))
        running = await serve(Service("holder", stage_mounts(store, [], GetLoadResponse)))
        store.advertise(running.server.address)
        stage.shared_memory.start()
        return stage

    yield start_stage
    for stage, channels in stages:
        await stage.shared_memory.close()
        await channels.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer_side, "SILENCE_SECONDS", 0.2)


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [64 * 1024 + 1, SLOT_BYTES, SLOT_BYTES + 1, 4 * SLOT_BYTES, 11 * SLOT_BYTES + 7])
async def test_another_process_of_the_host_reads_the_same_bytes(start: StartStage, size: int) -> None:
    maker, taker = await start(), await start()
    data, ref = await maker.put(size)
    payload = await taker.reader.read(TensorRef.FromString(ref.SerializeToString()), "latents")
    assert bytes(payload.buffer()) == data
    assert (taker.received("shared"), taker.received("stream"), taker.fallbacks) == (size, 0, 0)


async def test_in_one_process_no_slot_is_touched(start: StartStage) -> None:
    stage = await start()
    _, ref = await stage.put(3 * MIB)
    await stage.reader.read(ref, "latents")
    assert (stage.received("local"), stage.received("shared")) == (3 * MIB, 0)


async def test_many_transfers_one_after_the_other_leave_no_descriptor_open(start: StartStage) -> None:
    maker, taker = await start(), await start()
    data, ref = await maker.put(5 * MIB)
    await taker.reader.read(ref, "latents")
    before = descriptors()
    for _ in range(20):
        payload = await taker.reader.read(ref, "latents")
        assert bytes(payload.buffer()) == data
    assert descriptors() <= before + 1  # the last connection may not be closed yet


async def test_more_readers_than_slots_get_the_same_bytes_by_either_way(start: StartStage) -> None:
    maker, takers = await start(8 * MIB), [await start() for _ in range(6)]
    data, ref = await maker.put(9 * MIB)
    payloads = await asyncio.gather(*(taker.reader.read(ref, "latents") for taker in takers))
    assert all(bytes(payload.buffer()) == data for payload in payloads)
    ways = [(taker.received("shared"), taker.received("stream")) for taker in takers]
    assert all(sorted(way) == [0, 9 * MIB] for way in ways)
    assert any(shared for shared, _ in ways)


async def test_a_released_tensor_is_a_lease_that_has_expired(start: StartStage) -> None:
    maker, taker = await start(), await start()
    _, ref = await maker.put(MIB)
    await taker.reader.release([ref])
    with pytest.raises(LeaseExpiredError):
        await taker.reader.read(ref, "latents")


async def test_with_no_memory_for_it_leases_do_not_offer_it(start: StartStage) -> None:
    maker, taker = await start(0), await start()
    _, ref = await maker.put(MIB)
    await taker.reader.read(ref, "latents")
    assert ref.lease.host == ""
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 0)


async def test_a_lease_of_another_host_is_streamed(start: StartStage) -> None:
    maker, taker = await start(), await start()
    data, ref = await maker.put(MIB)
    ref.lease.host = "another boot/4026531840"
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 0)


@pytest.mark.parametrize("exchange_id", ["nobody", "", "x" * 200, "\0\0", "é"])
async def test_where_no_socket_answers_the_tensor_is_streamed(start: StartStage, exchange_id: str) -> None:
    maker, taker = await start(), await start()
    data, ref = await maker.put(MIB)
    ref.lease.exchange_id = exchange_id
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 1)


@pytest.mark.parametrize("side", [producer_side, consumer_side], ids=["producer refuses", "consumer refuses"])
async def test_processes_of_two_users_do_not_share(
    start: StartStage, monkeypatch: pytest.MonkeyPatch, side: object
) -> None:
    maker, taker = await start(), await start()
    data, ref = await maker.put(MIB)
    monkeypatch.setattr(side, "is_own_user", lambda connection: False)
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 1)


class Consumer:
    """The other end of the socket, by hand."""

    def __init__(self, ref: TensorRef) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(5)
        self.connection.connect(socket_name(ref.lease.exchange_id))
        self.connection.send(ref.lease.ticket.encode())
        greeting, (self.descriptor,), _, _ = socket.recv_fds(self.connection, GREETING.size, 1)
        self.size = GREETING.unpack(greeting)[0]

    def piece(self) -> tuple[int, int, int]:
        base, generation, size = PIECE.unpack(self.connection.recv(PIECE.size))
        return base, generation, size

    def close(self) -> None:
        self.connection.close()
        os.close(self.descriptor)


async def until_shared(maker: Stage, taker: Stage) -> None:
    """Returns when a tensor comes through shared memory again: the slots are back."""
    _, ref = await maker.put(2 * MIB)
    before = taker.received("shared")
    while taker.received("shared") == before:
        await taker.reader.read(ref, "latents")


async def test_a_consumer_that_dies_in_the_middle_gives_its_slots_back(start: StartStage) -> None:
    maker, taker = await start(), await start()
    _, ref = await maker.put(9 * MIB)
    dying = await asyncio.to_thread(Consumer, ref)
    await taker.reader.read(ref, "latents")
    assert taker.fallbacks == 1
    dying.close()
    await asyncio.wait_for(until_shared(maker, taker), 20)


async def test_a_consumer_that_falls_silent_loses_its_slots_and_knows(start: StartStage, impatient: None) -> None:
    maker, taker = await start(), await start()
    _, ref = await maker.put(9 * MIB)
    frozen = await asyncio.to_thread(Consumer, ref)
    pieces = [await asyncio.to_thread(frozen.piece) for _ in range(4)]
    await asyncio.wait_for(until_shared(maker, taker), 20)
    kept = [read_slot(frozen.descriptor, base, generation, memoryview(bytearray(n))) for base, generation, n in pieces]
    frozen.close()
    assert not all(kept)


async def test_a_consumer_that_asks_for_nothing_holds_nothing(start: StartStage, impatient: None) -> None:
    maker, taker = await start(), await start()
    mute = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mute.connect(socket_name(maker.store.exchange_id))
    data, ref = await maker.put(MIB)
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert taker.received("shared") == MIB
    mute.close()


async def test_a_reader_that_is_cancelled_leaves_nothing_behind(start: StartStage) -> None:
    maker, taker = await start(), await start()
    _, ref = await maker.put(64 * MIB)
    for _ in range(5):
        reading = asyncio.create_task(taker.reader.read(ref, "latents"))
        await asyncio.sleep(0.002)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    await asyncio.wait_for(until_shared(maker, taker), 20)


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[bytes], dict[int, TensorRef]]]:
    """A process of its own that holds tensors of 1 and 64 MiB."""
    command = [sys.executable, "-m", "bench.transport_holder", str(MIB), str(64 * MIB)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        offer = json.loads(process.stdout.readline())
        yield process, {int(n): TensorRef.FromString(bytes.fromhex(ref)) for n, ref in offer["references"].items()}
        process.kill()


async def test_a_holder_killed_in_the_middle_leaves_an_error_and_nothing_else(
    start: StartStage, holder: tuple[subprocess.Popen[bytes], dict[int, TensorRef]]
) -> None:
    process, refs = holder
    taker = await start()
    named = set(os.listdir("/dev/shm"))
    payload = await taker.reader.read(refs[MIB], "latents")
    kept = bytes(payload.buffer())
    before = descriptors()
    reading = asyncio.create_task(taker.reader.read(refs[64 * MIB], "latents"))
    await asyncio.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcome = (await asyncio.gather(reading, return_exceptions=True))[0]
    assert isinstance(outcome, (StageUnavailableError, BytesPayload))  # it may just have been done
    with pytest.raises(StageUnavailableError):
        await taker.reader.read(refs[MIB], "latents")
    assert bytes(payload.buffer()) == kept
    assert set(os.listdir("/dev/shm")) <= named
    assert descriptors() <= before + 3  # gRPC's own
