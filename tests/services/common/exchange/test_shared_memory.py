"""Laws of shared memory: the same bytes without the stream, and never the only way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket

import pytest

from safelight.errors import LeaseExpiredError
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorRef
from services.common.exchange import BytesPayload
from services.common.exchange import shared_memory_reader as consumer_side
from services.common.exchange import shared_memory_server as producer_side
from services.common.exchange.host import host_identity, socket_name
from services.common.exchange.slot_pool import SLOT_BYTES, SlotPool
from services.common.settings import StageSettings
from services.common.stage import make_surroundings
from tests.support.sharing_stage import StartSharingStage, open_descriptors

pytestmark = pytest.mark.skipif(not host_identity(), reason="the system has no memfd")
MIB = 1024 * 1024


@pytest.mark.parametrize("size", [64 * 1024 + 1, SLOT_BYTES, SLOT_BYTES + 1, 4 * SLOT_BYTES, 11 * SLOT_BYTES + 7])
async def test_another_process_of_the_host_reads_the_same_bytes(start_sharing: StartSharingStage, size: int) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    data, ref = await maker.put(size)
    payload = await taker.reader.read(TensorRef.FromString(ref.SerializeToString()), "latents")
    assert bytes(payload.buffer()) == data
    assert (taker.received("shared"), taker.received("stream"), taker.fallbacks) == (size, 0, 0)


async def test_in_one_process_no_slot_is_touched(start_sharing: StartSharingStage) -> None:
    stage = await start_sharing()
    _, ref = await stage.put(3 * MIB)
    await stage.reader.read(ref, "latents")
    assert (stage.received("local"), stage.received("shared")) == (3 * MIB, 0)


async def test_many_transfers_one_after_the_other_leave_no_descriptor_open(start_sharing: StartSharingStage) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    data, ref = await maker.put(5 * MIB)
    await taker.reader.read(ref, "latents")
    before = open_descriptors()
    for _ in range(40):
        payload = await taker.reader.read(ref, "latents")
        assert bytes(payload.buffer()) == data
    assert open_descriptors() < before + 20  # the last connections may not be closed yet


async def test_more_readers_than_slots_get_the_same_bytes_by_either_way(start_sharing: StartSharingStage) -> None:
    maker, takers = await start_sharing(8 * MIB), [await start_sharing() for _ in range(6)]
    data, ref = await maker.put(9 * MIB)
    payloads = await asyncio.gather(*(taker.reader.read(ref, "latents") for taker in takers))
    assert all(bytes(payload.buffer()) == data for payload in payloads)
    ways = [(taker.received("shared"), taker.received("stream")) for taker in takers]
    assert all(sorted(way) == [0, 9 * MIB] for way in ways)
    assert any(shared for shared, _ in ways)


async def test_a_released_tensor_is_a_lease_that_has_expired(start_sharing: StartSharingStage) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    _, ref = await maker.put(MIB)
    maker.store.release([ref.lease.ticket])
    with pytest.raises(LeaseExpiredError):
        await taker.reader.read(ref, "latents")


async def test_with_no_memory_for_it_leases_do_not_offer_it(start_sharing: StartSharingStage) -> None:
    maker, taker = await start_sharing(0), await start_sharing()
    _, ref = await maker.put(MIB)
    await taker.reader.read(ref, "latents")
    assert ref.lease.host == ""
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 0)


async def test_a_lease_of_another_host_is_streamed(start_sharing: StartSharingStage) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    data, ref = await maker.put(MIB)
    ref.lease.host = "another boot/4026531840"
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 0)


@pytest.mark.parametrize("exchange_id", ["nobody", "", "x" * 200, "\0\0", "é"])
async def test_where_no_socket_answers_the_tensor_is_streamed(
    start_sharing: StartSharingStage, exchange_id: str
) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    data, ref = await maker.put(MIB)
    ref.lease.exchange_id = exchange_id
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 1)


@pytest.mark.parametrize("side", [producer_side, consumer_side], ids=["producer refuses", "consumer refuses"])
async def test_processes_of_two_users_do_not_share(
    start_sharing: StartSharingStage, monkeypatch: pytest.MonkeyPatch, side: object
) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    data, ref = await maker.put(MIB)
    monkeypatch.setattr(side, "is_own_user", lambda connection: False)
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert (taker.received("stream"), taker.fallbacks) == (MIB, 1)


async def test_bytes_that_were_spoiled_on_the_way_are_streamed(
    start_sharing: StartSharingStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, taker = await start_sharing(), await start_sharing()
    data, ref = await maker.put(3 * MIB)
    honest = SlotPool.write
    monkeypatch.setattr(SlotPool, "write", lambda pool, slot, piece: honest(pool, slot, memoryview(bytes(len(piece)))))
    assert bytes((await taker.reader.read(ref, "latents")).buffer()) == data
    assert (taker.received("stream"), taker.fallbacks) == (3 * MIB, 1)


@pytest.mark.parametrize(("shared_memory_bytes", "offered"), [(64 * MIB, True), (0, False)])
async def test_a_stage_offers_its_memory_unless_that_is_turned_off(shared_memory_bytes: int, offered: bool) -> None:
    surroundings = make_surroundings(StageSettings(shared_memory_bytes=shared_memory_bytes))
    surroundings.advertise("127.0.0.1:1")
    header = TensorHeader(dtype=DATA_TYPE_UINT8, shape=[MIB])
    ref = await surroundings.store.put(header, BytesPayload(bytes(MIB)))
    await surroundings.close()
    assert bool(ref.lease.host) is offered


@pytest.mark.parametrize("moments", range(6))
async def test_a_connection_that_comes_while_the_server_closes_is_closed_with_it(moments: int) -> None:
    surroundings = make_surroundings(StageSettings())
    surroundings.advertise("127.0.0.1:1")
    for _ in range(5):
        await asyncio.sleep(0)  # the server waits for somebody
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as consumer:
        consumer.connect(socket_name(surroundings.store.exchange_id))
        consumer.setblocking(False)
        for _ in range(moments):
            await asyncio.sleep(0)
        await surroundings.close()
        gc.collect()  # an open socket that nobody has any more is a warning, and so an error
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.get_running_loop().sock_recv(consumer, 1) == b""
