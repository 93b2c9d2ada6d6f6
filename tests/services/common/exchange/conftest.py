"""What the tests of shared memory share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from safelight.v1.load_service_pb2 import GetLoadResponse
from services.common.channels import ChannelPool
from services.common.exchange import SharedMemoryServer, TensorReader, TensorStore
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve
from tests.support.sharing_stage import SharingStage, StartSharingStage

MIB = 1024 * 1024


@pytest.fixture
async def start_sharing(serve: Serve) -> AsyncIterator[StartSharingStage]:
    stages: list[tuple[SharingStage, ChannelPool]] = []

    async def start_stage(pool_bytes: int = 4 * MIB) -> SharingStage:
        metrics, channels = Metrics(), ChannelPool()
        store = TensorStore(60.0, metrics)
        stage = SharingStage(
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
