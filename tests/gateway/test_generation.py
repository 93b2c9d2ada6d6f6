"""The gateway in front of real stages: the stream, several replicas, failures on the way, deadlines and bounds."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from safelight import (
    Accepted,
    AsyncClient,
    DeadlineExceededError,
    Event,
    GenerationOptions,
    GenerationResult,
    Progress,
    StageUnavailableError,
    UnknownModelError,
)
from services.common.server import Server
from tests.support.cluster import Cluster, run_cluster

USEFUL = {"model": "tiny", "outcome": "useful"}


def client_of(cluster: Cluster) -> AsyncClient:
    assert cluster.client is not None
    return cluster.client


async def crash(server: Server) -> None:
    """End a server as its process's death would: every call is cut."""
    await server.stop()


async def events_of(cluster: Cluster, options: GenerationOptions) -> list[Event]:
    return [event async for event in client_of(cluster).stream(options)]


async def test_a_request_streams_its_road_through_the_stages(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest) as cluster:
        events = await events_of(cluster, GenerationOptions(prompt="a cat", steps=2, seed=5))
    road = [(event.stage, event.step) for event in events if isinstance(event, Progress)]
    assert isinstance(events[0], Accepted)
    assert events[0].seeds == (5,)
    assert road == [("encoder", 0), ("encoder", 1), ("denoiser", 1), ("denoiser", 2), ("decoder", 0), ("decoder", 1)]
    assert isinstance(events[-1], GenerationResult)
    assert events[-1].images[0].image.size == (128, 128)


async def test_several_pictures_have_seeds_that_count_up_and_equal_their_single_runs(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, denoisers=2) as cluster:
        client = client_of(cluster)
        together = await client.generate("a cat", steps=3, seed=7, num_images=3, format="latents")
        alone = [await client.generate("a cat", steps=3, seed=seed, format="latents") for seed in (7, 8, 9)]
    assert [image.seed for image in together.images] == [7, 8, 9]
    assert [image.data for image in together.images] == [result.images[0].data for result in alone]


async def test_the_same_seed_is_the_same_picture_on_every_replica(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, encoders=2, denoisers=2, decoders=2) as cluster:
        runs = [client_of(cluster).generate("a cat", steps=3, seed=1) for _ in range(4)]
        images = [result.images[0] for result in await asyncio.gather(*runs)]
    denoisers = {stage.replica for image in images for stage in image.stages if stage.stage == "denoiser"}
    assert len(denoisers) == 2
    assert len({image.data for image in images}) == 1


async def test_work_is_spread_by_what_is_outstanding(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, denoisers=2) as cluster:
        await asyncio.gather(*(client_of(cluster).generate("a cat", steps=4, seed=n) for n in range(6)))
        steps = [
            server.metrics.registry.get_sample_value("safelight_denoise_steps_total", USEFUL)
            for server in cluster.denoisers
        ]
    assert steps == [12, 12]


async def test_a_denoiser_that_dies_in_the_middle_costs_no_request(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, denoisers=2) as cluster:
        client = client_of(cluster)
        expected = await client.generate("a cat", steps=30, seed=3)
        alive = 2
        async for event in client.stream(GenerationOptions(prompt="a cat", steps=30, seed=3)):
            if isinstance(event, Progress) and event.stage == "denoiser" and event.step == 2 and alive == 2:
                await crash(next(server for server in cluster.denoisers if running(server)))
                alive = 1
            result = event
    assert isinstance(result, GenerationResult)
    assert result.images[0].data == expected.images[0].data


def running(server: Server) -> bool:
    return bool(server.metrics.registry.get_sample_value("safelight_running", {"stage": "denoiser"}))


async def test_a_replica_that_comes_back_is_taken_back(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, denoisers=2) as cluster:
        client, gone = client_of(cluster), cluster.denoisers[0]
        await crash(gone)
        await client.generate("a cat", steps=2)
        cluster.denoisers[0] = await cluster.restart_denoiser(gone, tiny_manifest)
        await cluster.until_replicas("denoiser", 2)
        await asyncio.gather(*(client.generate("a cat", steps=2) for _ in range(4)))
        steps = cluster.denoisers[0].metrics.registry.get_sample_value("safelight_denoise_steps_total", USEFUL)
    assert steps


async def test_a_stage_that_is_down_is_named_and_the_gateway_goes_on(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, gateway={"replica_wait_seconds": 0.2}) as cluster:
        await crash(cluster.decoders[0])
        with pytest.raises(StageUnavailableError, match="decoder") as caught:
            await client_of(cluster).generate("a cat", steps=2)
        assert caught.value.retry_after_seconds
        assert await client_of(cluster).models() == []


async def test_an_unknown_model_is_answered_with_the_known_ones(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest) as cluster:
        with pytest.raises(UnknownModelError, match="tiny"):
            await client_of(cluster).generate("a cat", model="sdxl")


async def test_a_deadline_stops_the_work(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest) as cluster:
        with pytest.raises(DeadlineExceededError):
            await client_of(cluster).generate("a cat", steps=1000, timeout_seconds=0.5)
        await cluster.until_idle()
        assert cluster.total("safelight_denoise_steps_total") < 1000


async def test_leaving_the_stream_stops_the_work(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest) as cluster:
        stream = client_of(cluster).stream(GenerationOptions(prompt="a cat", steps=1000))
        async for event in stream:
            if isinstance(event, Progress) and event.stage == "denoiser":
                break
        await stream.aclose()
        await cluster.until_idle()
        assert cluster.total("safelight_denoise_steps_total") < 1000


async def test_leases_end_with_their_request(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest) as cluster:
        # 64x72 latents are above what rides inline, so they are leased.
        await client_of(cluster).generate("a cat", steps=1, width=576, height=512, format="latents")
        await cluster.until("safelight_leases", 0)
        moved = [cluster.total("safelight_tensor_bytes_total", path=path) for path in ("stream", "shared")]
        assert sum(moved) == 4 * 64 * 72 * 4


def test_the_gateway_never_imports_torch() -> None:
    code = "import gateway.__main__, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=".").returncode == 0
