"""The newest checkpoint is kept here, the denoiser's memory is given back, and nothing is left at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from gateway.checkpoints import Checkpoints
from gateway.leases import Leases
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8
from safelight.v1.work_pb2 import Checkpoint
from services.common.channels import ChannelPool
from services.common.exchange import TensorReader, TensorStore
from services.common.metrics import Metrics
from tests.serving import Serve
from tests.support.fake_stages import FakeDenoiser, rest, tensor

LARGE = bytes(range(256)) * 1024  # more than rides inline


@dataclass
class Place:
    """A gateway's place for one picture, and the denoiser that announces."""

    checkpoints: Checkpoints
    store: TensorStore
    metrics: Metrics
    denoiser: FakeDenoiser

    async def announce(self, step: int, data: bytes) -> None:
        self.checkpoints.announce(Checkpoint(step=step, sampler_state=await self.denoiser.lease(data)))

    def bytes_kept(self) -> float | None:
        return self.metrics.registry.get_sample_value("safelight_checkpoint_bytes")


@pytest.fixture
async def place(serve: Serve) -> AsyncIterator[Place]:
    denoiser = FakeDenoiser(rest)
    await serve(denoiser.service())
    metrics, channels = Metrics(), ChannelPool()
    store, leases = TensorStore(60.0, metrics), Leases(channels)
    reader = TensorReader(store, channels, len(LARGE) + 1, metrics)
    yield Place(Checkpoints(reader, store, leases, metrics), store, metrics, denoiser)
    await leases.settle()
    await channels.close()


async def test_a_checkpoint_is_fetched_and_given_back_to_its_denoiser_at_once(place: Place) -> None:
    await place.announce(3, LARGE)
    await place.denoiser.store.until_empty()
    newest = await place.checkpoints.newest()
    assert newest is not None
    assert (newest.step, place.bytes_kept()) == (3, len(LARGE))
    assert bytes(place.store.get(newest.sampler_state.lease.ticket).buffer()) == LARGE
    place.checkpoints.close()


async def test_of_many_only_the_newest_is_kept(place: Place) -> None:
    for step in range(1, 9):
        await place.announce(step, LARGE[:-1] + bytes([step]))
    await place.denoiser.store.until_empty()
    newest = await place.checkpoints.newest()
    assert newest is not None
    assert (newest.step, place.bytes_kept()) == (8, len(LARGE))
    place.checkpoints.close()


async def test_a_small_one_needs_no_fetching(place: Place) -> None:
    place.checkpoints.announce(Checkpoint(step=2, sampler_state=tensor(b"state", DATA_TYPE_UINT8)))
    await place.checkpoints.settle(1.0)
    newest = await place.checkpoints.newest()
    assert newest is not None
    assert newest.sampler_state.inline == b"state"
    place.checkpoints.close()


async def test_one_that_can_not_be_had_leaves_the_one_before(place: Place) -> None:
    await place.announce(3, LARGE)
    await place.denoiser.store.until_empty()
    lost = Checkpoint(step=6, sampler_state=await place.denoiser.lease(LARGE))
    place.denoiser.store.release([lost.sampler_state.lease.ticket])
    place.checkpoints.announce(lost)
    await place.checkpoints.settle(5.0)
    newest = await place.checkpoints.newest()
    assert newest is not None
    assert newest.step == 3
    place.checkpoints.close()


async def test_one_that_is_too_large_stays_where_it_is(place: Place) -> None:
    await place.announce(3, LARGE * 2)
    await place.denoiser.store.until_empty()
    assert await place.checkpoints.newest() is None
    place.checkpoints.close()


async def test_nothing_is_left_when_the_picture_has_ended(place: Place) -> None:
    await place.announce(3, LARGE)
    await place.checkpoints.settle(5.0)
    await place.checkpoints.newest()
    await place.announce(4, LARGE)
    place.checkpoints.close()
    assert place.bytes_kept() == 0
    assert place.metrics.registry.get_sample_value("safelight_leases") == 0
    await asyncio.wait_for(place.denoiser.store.until_empty(), 5.0)
