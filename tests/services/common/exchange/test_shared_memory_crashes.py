"""Laws of shared memory when a side dies, freezes or leaves: the other loses nothing, and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight.errors import StageUnavailableError
from safelight.v1.tensor_pb2 import TensorRef
from services.common.exchange import BytesPayload
from services.common.exchange import shared_memory_server as producer_side
from services.common.exchange.host import host_identity, socket_name
from services.common.exchange.shared_memory_server import GREETING, PIECE
from services.common.exchange.slot_pool import SlotReader
from tests.support.sharing_stage import SharingStage, StartSharingStage, open_descriptors

pytestmark = pytest.mark.skipif(not host_identity(), reason="the system has no memfd")
MIB = 1024 * 1024
ROOT = Path(__file__).parents[4]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer_side, "SILENCE_SECONDS", 0.2)


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


async def until_shared(maker: SharingStage, taker: SharingStage) -> None:
    """Returns when a tensor comes through shared memory again: the slots are back."""
    _, ref = await maker.put(2 * MIB)
    before = taker.received("shared")
    while taker.received("shared") == before:
        await taker.reader.read(ref, "latents")


async def test_a_consumer_that_dies_in_the_middle_gives_its_slots_back(start_sharing: StartSharingStage) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    _, ref = await maker.put(9 * MIB)
    dying = await asyncio.to_thread(Consumer, ref)
    await taker.reader.read(ref, "latents")
    assert taker.fallbacks == 1
    dying.close()
    await asyncio.wait_for(until_shared(maker, taker), 20)


async def test_a_consumer_that_falls_silent_loses_its_slots_and_knows(
    start_sharing: StartSharingStage, impatient: None
) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    _, ref = await maker.put(9 * MIB)
    frozen = await asyncio.to_thread(Consumer, ref)
    pieces = [await asyncio.to_thread(frozen.piece) for _ in range(4)]
    await asyncio.wait_for(until_shared(maker, taker), 20)
    slots = SlotReader(frozen.descriptor)
    kept = [slots.read(base, generation, memoryview(bytearray(size))) for base, generation, size in pieces]
    frozen.close()
    assert not all(kept)


async def test_a_consumer_that_asks_for_nothing_holds_nothing(
    start_sharing: StartSharingStage, impatient: None
) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    mute = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mute.connect(socket_name(maker.store.exchange_id))
    data, ref = await maker.put(MIB)
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert taker.received("shared") == MIB
    mute.close()


async def test_a_reader_that_is_cancelled_leaves_nothing_behind(start_sharing: StartSharingStage) -> None:
    maker, taker = await start_sharing(), await start_sharing()
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
    start_sharing: StartSharingStage, holder: tuple[subprocess.Popen[bytes], dict[int, TensorRef]]
) -> None:
    process, refs = holder
    taker = await start_sharing()
    named = set(os.listdir("/dev/shm"))
    payload = await taker.reader.read(refs[MIB], "latents")
    kept = bytes(payload.buffer())
    before = open_descriptors()
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
    assert open_descriptors() <= before + 3  # gRPC's own
