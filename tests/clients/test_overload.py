"""More work than a real gateway takes: the client waits, and everyone gets a picture in the end."""

from __future__ import annotations

import asyncio

from safelight import AsyncClient, OverloadedError, RetryPolicy
from tests.support.cluster import Cluster, run_cluster

FULL = {"max_images_in_flight": 2}


def endpoint_of(cluster: Cluster) -> str:
    assert cluster.gateway is not None
    return cluster.gateway.address


async def test_requests_beyond_the_gateway_s_room_wait_and_are_served(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, gateway=FULL) as cluster, AsyncClient(endpoint_of(cluster)) as client:
        calls = [client.generate("a cat", steps=2, width=64, height=64, seed=seed) for seed in range(6)]
        results = await asyncio.gather(*calls)
        refused = cluster.total("safelight_requests_total", code="RESOURCE_EXHAUSTED")
    assert [result.images[0].seed for result in results] == list(range(6))
    assert refused > 0


async def test_without_retries_they_are_refused_with_a_time_to_come_back(tiny_manifest: str) -> None:
    never = RetryPolicy.none
    async with (
        run_cluster(tiny_manifest, gateway=FULL) as cluster,
        AsyncClient(endpoint_of(cluster), retry=never) as client,
    ):
        calls = [client.generate("a cat", steps=2, width=64, height=64) for _ in range(6)]
        results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, OverloadedError)]
    assert 0 < len(refused) < 6
    assert all(error.retry_after_seconds for error in refused)
