"""Every stage tells how busy it is, and what its work has cost."""

from __future__ import annotations

from safelight.v1.load_service_pb2 import GetLoadRequest, GetLoadResponse
from safelight.v1.load_service_pb2_grpc import LoadServiceStub
from services.common.channels import open_channel
from tests.support.cluster import Cluster, run_cluster

SHAPE = [4, 16, 16]


async def load_of(address: str) -> GetLoadResponse:
    channel = open_channel(address)
    try:
        return await LoadServiceStub(channel).GetLoad(GetLoadRequest())
    finally:
        await channel.close()


async def draw(cluster: Cluster, count: int) -> None:
    assert cluster.client is not None
    for seed in range(count):
        await cluster.client.generate(f"cat {seed}", steps=3, width=128, height=128, seed=seed)


async def test_an_idle_stage_has_no_backlog_and_knows_what_its_work_costs(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest) as cluster:
        await draw(cluster, 3)
        loads = {server.service.name: await load_of(server.address) for server in cluster.servers[:3]}
    for stage, shape in (("encoder", []), ("denoiser", SHAPE), ("decoder", SHAPE)):
        load = loads[stage]
        assert (load.running, load.waiting, load.draining) == (0, 0, False), stage
        assert load.backlog_seconds == 0, stage
        assert load.capacity > 64, stage
        measured = [cost for cost in load.costs if list(cost.latent_shape) == shape]
        assert {cost.model for cost in measured} == {"tiny"}, stage
        assert all(cost.seconds > 0 and cost.rows > 0 for cost in measured), stage
