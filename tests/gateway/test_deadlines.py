"""Deadlines and load in front of real stages: refused at once, made with fewer steps, or made; told either way."""

from __future__ import annotations

import pytest

from safelight import Accepted, DeadlineExceededError, DeadlineUnreachableError, GenerationOptions, GenerationResult
from tests.support.cluster import Cluster, run_cluster

# Work counts as a hundred times as long as it is: it is refused by a deadline that it would meet on any machine.
STRICT = {"deadline_factor": 0.01}
SECONDS = 60.0


async def measure(cluster: Cluster) -> None:
    """Let every stage measure what its work costs, and the gateway read it."""
    assert cluster.client is not None
    for seed in range(2):
        await cluster.client.generate(f"cat {seed}", steps=8, seed=seed)
    assert cluster.gateway is not None
    while not cluster.total("safelight_estimate_ratio_count"):
        await cluster.client.generate("a cat", steps=2)


async def test_an_unreachable_deadline_is_refused_before_any_step(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, gateway=STRICT) as cluster:
        await measure(cluster)
        assert cluster.client is not None
        steps = cluster.total("safelight_denoise_steps_total")
        with pytest.raises(DeadlineUnreachableError, match="min_steps") as caught:
            await cluster.client.generate("a cat", steps=1000, timeout_seconds=SECONDS / 30)
        assert float(caught.value.metadata["estimated_seconds"]) > SECONDS / 30 * STRICT["deadline_factor"]
        assert cluster.total("safelight_denoise_steps_total") == steps
        assert cluster.total("safelight_admission_refused_total", reason="deadline") == 1


async def test_a_deadline_that_passes_in_the_middle_is_counted_where_it_passed(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest) as cluster:
        assert cluster.client is not None
        with pytest.raises(DeadlineExceededError):
            await cluster.client.generate("a cat", steps=1000, timeout_seconds=0.5)
        await cluster.until("safelight_deadline_missed_total", 1.0, stage="denoiser")


async def test_with_min_steps_a_picture_of_fewer_steps_is_made_and_says_so(tiny_manifest: str) -> None:
    async with run_cluster(tiny_manifest, gateway=STRICT) as cluster:
        await measure(cluster)
        assert cluster.client is not None
        options = GenerationOptions(prompt="a cat", steps=1000, min_steps=1)
        events = [event async for event in cluster.client.stream(options, timeout_seconds=SECONDS)]
    accepted, result = events[0], events[-1]
    assert isinstance(accepted, Accepted)
    assert isinstance(result, GenerationResult)
    (image,) = result.images
    assert accepted.estimated_seconds
    assert accepted.estimated_seconds <= SECONDS * STRICT["deadline_factor"]
    assert image.steps_saved > 0
    assert image.steps_saved + image.steps == 1000
