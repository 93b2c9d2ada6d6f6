"""Who gets the next piece of work, and who is left out."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.replicas import Replica, ReplicaSet
from safelight.errors import StageUnavailableError, UnknownModelError
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.model_pb2 import ModelDescription
from safelight.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from services.common.channels import ChannelPool
from services.common.metrics import Metrics
from services.common.model_servicer import ModelServicer
from services.common.server import Service
from tests.serving import Serve, unary


def stage(*models: str) -> Service:
    """A stage that does nothing but say which models it serves."""

    async def encode(request: EncodeRequest) -> EncodeResponse:
        return EncodeResponse()

    servicer = ModelServicer(lambda: [ModelDescription(name=name) for name in models])
    mounts = unary(encode).mounts | {
        "safelight.v1.ModelService": lambda server: add_ModelServiceServicer_to_server(servicer, server)
    }
    return Service("encoder", mounts, models)


@pytest.fixture
async def channels() -> AsyncIterator[ChannelPool]:
    pool = ChannelPool()
    yield pool
    await pool.close()


def replica_set(channels: ChannelPool, *targets: str) -> ReplicaSet:
    return ReplicaSet("encoder", targets, 60.0, channels, Metrics())


async def test_the_replica_with_the_least_outstanding_work_is_next(serve: Serve, channels: ChannelPool) -> None:
    servers = [await serve(stage("sd15")) for _ in range(2)]
    replicas = replica_set(channels, *(running.server.address for running in servers))
    await replicas.refresh()
    first = replicas.pick("sd15")
    with first.work(10):
        second = replicas.pick("sd15")
        with second.work(3):
            third = replicas.pick("sd15")
    assert second is not first
    assert third is second


async def test_a_replica_to_avoid_is_taken_only_when_there_is_no_other(serve: Serve, channels: ChannelPool) -> None:
    servers = [await serve(stage("sd15")) for _ in range(2)]
    replicas = replica_set(channels, *(running.server.address for running in servers))
    await replicas.refresh()
    first = replicas.pick("sd15")
    other = replicas.pick("sd15", avoid={first})
    assert other is not first
    assert replicas.pick("sd15", avoid={first, other}) in (first, other)


async def test_only_replicas_that_serve_the_model_are_asked(serve: Serve, channels: ChannelPool) -> None:
    one, both = await serve(stage("sd15")), await serve(stage("sd15", "sdxl"))
    replicas = replica_set(channels, one.server.address, both.server.address)
    await replicas.refresh()
    assert replicas.pick("sdxl").address == both.server.address
    with pytest.raises(UnknownModelError, match="flux"):
        replicas.pick("flux")


async def test_without_a_healthy_replica_the_stage_is_named(channels: ChannelPool) -> None:
    replicas = replica_set(channels, "unix:/nowhere/encoder.sock")
    await replicas.refresh()
    with pytest.raises(StageUnavailableError, match=r"no encoder is reachable \(of 1 known\)") as caught:
        replicas.pick("sd15")
    assert caught.value.retry_after_seconds == 60.0


async def test_a_failed_call_leaves_a_replica_out_until_its_next_good_probe(
    serve: Serve, channels: ChannelPool
) -> None:
    replicas = replica_set(channels, (await serve(stage("sd15"))).server.address)
    await replicas.refresh()
    replica: Replica = replicas.pick("sd15")
    replicas.report_failure(replica)
    with pytest.raises(StageUnavailableError):
        replicas.pick("sd15")
    await replicas.refresh()
    assert replicas.pick("sd15") is replica


async def test_a_name_stands_for_all_its_addresses_and_an_unknown_one_for_none(
    serve: Serve, channels: ChannelPool
) -> None:
    address = (await serve(stage("sd15"))).server.address
    port = address.rpartition(":")[2]
    replicas = replica_set(channels, f"dns:///localhost:{port}", "dns:///nowhere.invalid:1")
    await replicas.refresh()
    assert replicas.pick("sd15").address == address
