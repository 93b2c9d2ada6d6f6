"""Who gets the next piece of work, and who is left out."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.replicas import Replica, ReplicaSet
from gateway.work import Work
from safelight.errors import FingerprintMismatchError, StageUnavailableError, UnknownModelError
from safelight.v1.encoder_service_pb2 import EncodeRequest, EncodeResponse
from safelight.v1.load_service_pb2 import GetLoadResponse, WorkCost
from safelight.v1.model_pb2 import EncoderDescription, ModelDescription
from services.common.channels import ChannelPool
from services.common.exchange import TensorStore
from services.common.metrics import Metrics
from services.common.server import Service
from services.common.stage import stage_mounts
from tests.serving import Serve, unary

IDLE = GetLoadResponse()
WORK = Work("sd15", rows=2)


def stage(*models: str, load: GetLoadResponse = IDLE, fingerprint: str = "") -> Service:
    """A stage that does nothing but say which models it serves and how busy it is."""

    async def encode(request: EncodeRequest) -> EncodeResponse:
        return EncodeResponse()

    encoder = EncoderDescription(fingerprint=fingerprint)
    described = [ModelDescription(name=name, encoder=encoder) for name in models]
    store = TensorStore(60.0, Metrics())
    return Service("encoder", unary(encode).mounts | stage_mounts(store, described, lambda: load), models)


def busy(backlog_seconds: float, each: float) -> GetLoadResponse:
    """The load of a stage to which a batch of two is so many seconds of work."""
    return GetLoadResponse(backlog_seconds=backlog_seconds, costs=[WorkCost(model="sd15", rows=2, seconds=each)])


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
    with first.work(Work("sd15", rows=10)):
        second = replicas.pick("sd15")
        with second.work(Work("sd15", rows=3)):
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


async def test_the_replica_that_will_be_done_first_is_next(serve: Serve, channels: ChannelPool) -> None:
    slow, fast = await serve(stage("sd15", load=busy(0.0, 90.0))), await serve(stage("sd15", load=busy(60.0, 10.0)))
    replicas = replica_set(channels, slow.server.address, fast.server.address)
    await replicas.refresh()
    first = replicas.pick("sd15", work=WORK)
    assert first.address == fast.server.address
    with first.work(WORK), first.work(WORK), first.work(WORK):
        assert replicas.pick("sd15", work=WORK).address == slow.server.address
    assert replicas.pick("sd15", work=WORK) is first


async def test_until_all_have_measured_something_the_least_outstanding_work_counts(
    serve: Serve, channels: ChannelPool
) -> None:
    measured, fresh = await serve(stage("sd15", load=busy(60.0, 10.0))), await serve(stage("sd15"))
    replicas = replica_set(channels, measured.server.address, fresh.server.address)
    await replicas.refresh()
    first = replicas.pick("sd15", work=WORK)
    with first.work(WORK):
        assert replicas.pick("sd15", work=WORK) is not first


async def test_a_replica_that_is_stopping_gets_nothing_new(serve: Serve, channels: ChannelPool) -> None:
    stopping, other = await serve(stage("sd15", load=GetLoadResponse(draining=True))), await serve(stage("sd15"))
    replicas = replica_set(channels, stopping.server.address, other.server.address)
    await replicas.refresh()
    assert replicas.pick("sd15").address == other.server.address
    assert replicas.pick("sd15", avoid={replicas.pick("sd15")}).address == other.server.address


async def test_only_replicas_with_the_weights_asked_for_are_asked(serve: Serve, channels: ChannelPool) -> None:
    servers = {weights: await serve(stage("sd15", fingerprint=weights)) for weights in ("old", "new")}
    replicas = replica_set(channels, *(running.server.address for running in servers.values()))
    await replicas.refresh()
    assert replicas.pick("sd15", fingerprint="new").address == servers["new"].server.address
    only_new = replicas.pick("sd15", avoid={replicas.pick("sd15", fingerprint="new")}, fingerprint="new")
    assert only_new.address == servers["new"].server.address
    with pytest.raises(FingerprintMismatchError, match="older") as caught:
        replicas.pick("sd15", fingerprint="older")
    assert caught.value.metadata["stage"] == "encoder"


async def test_a_stage_that_does_not_tell_its_load_is_asked_all_the_same(serve: Serve, channels: ChannelPool) -> None:
    service = stage("sd15")
    silent = Service(
        "encoder", {name: mount for name, mount in service.mounts.items() if "Load" not in name}, service.models
    )
    address = (await serve(silent)).server.address
    replicas = replica_set(channels, address)
    await replicas.refresh()
    assert replicas.pick("sd15", work=WORK).address == address


async def test_the_backlog_of_all_replicas_is_shown_for_autoscalers(serve: Serve, channels: ChannelPool) -> None:
    servers = [await serve(stage("sd15", load=busy(seconds, 1.0))) for seconds in (100.0, 200.0)]
    metrics = Metrics()
    addresses = [running.server.address for running in servers]
    replicas = ReplicaSet("encoder", addresses, 60.0, channels, metrics)
    replicas.pending.add(5.0, 10)
    await replicas.refresh()
    shown = metrics.registry.get_sample_value("safelight_stage_backlog_seconds", {"stage": "encoder"})
    assert shown == pytest.approx(350.0, abs=10.0)


async def test_the_capacity_is_that_of_the_replicas_that_are_there(serve: Serve, channels: ChannelPool) -> None:
    servers = [await serve(stage("sd15", load=GetLoadResponse(capacity=capacity))) for capacity in (5, 7)]
    replicas = replica_set(channels, *(running.server.address for running in servers))
    await replicas.refresh()
    assert replicas.capacity == 12
    first = replicas.pick("sd15")
    replicas.report_failure(first)
    assert replicas.capacity == 12 - first.backlog.report.capacity
    replicas.report_failure(replicas.pick("sd15"))
    assert replicas.capacity == 12
