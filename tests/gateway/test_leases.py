"""Laws of ending leases: every holder is told of its own, and one that is gone holds nobody up."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.leases import Leases
from safelight.v1.load_service_pb2 import GetLoadResponse
from safelight.v1.tensor_pb2 import DATA_TYPE_UINT8, TensorHeader, TensorRef
from services.common.channels import ChannelPool
from services.common.exchange import BytesPayload, TensorStore
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve

SIZES = (9, 100_000, 200_000)
"""Of tensors: inline, and under leases."""


@pytest.fixture
async def leases() -> AsyncIterator[Leases]:
    channels = ChannelPool()
    yield Leases(channels)
    await channels.close()


class Holder:
    """Serves the leases of a store."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.store = TensorStore(60.0, self.metrics)

    async def start(self, serve: Serve) -> list[TensorRef]:
        """References to its tensors."""
        running = await serve(Service("holder", stage_mounts(self.store, [], GetLoadResponse)))
        self.store.advertise(running.server.address)
        headers = [TensorHeader(dtype=DATA_TYPE_UINT8, shape=[size]) for size in SIZES]
        return [await self.store.put(header, BytesPayload(bytes(header.shape[0]))) for header in headers]

    @property
    def held(self) -> float | None:
        return self.metrics.registry.get_sample_value("safelight_leases")


async def test_every_holder_is_told_of_its_own(serve: Serve, leases: Leases) -> None:
    holders = Holder(), Holder()
    refs = [ref for holder in holders for ref in await holder.start(serve)]
    assert [holder.held for holder in holders] == [2, 2]
    leases.release(refs)
    await leases.settle()
    assert [holder.held for holder in holders] == [0, 0]


async def test_a_holder_that_is_gone_holds_nobody_up(serve: Serve, leases: Leases) -> None:
    gone, there = Holder(), Holder()
    lost = await gone.start(serve)
    for ref in lost:
        if ref.HasField("lease"):
            ref.lease.endpoint = "127.0.0.1:1"
    leases.release([*lost, *await there.start(serve)])
    await leases.settle()
    assert there.held == 0
