"""A rank of the only denoiser is killed in the middle of a request that came through the gateway."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bench.server_process import ServerProcess
from safelight import AsyncClient, GeneratedImage, GenerationOptions, GenerationResult, Progress
from tests.support.cluster import run_cluster
from tests.support.rank_processes import rank_processes, until_gone
from tests.support.tiny_flux import save_tiny_flux

STEPS = 100
OPTIONS = GenerationOptions(
    prompt="a cat", negative_prompt="a dog", steps=STEPS, guidance_scale=3.0, seed=1, width=64, height=64
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of which two ranks compute the rows."""
    folder = tmp_path_factory.mktemp("models")
    model = {"name": "tiny", "path": str(save_tiny_flux(folder / "tiny")), "denoiser": {"parallel": {"cfg": 2}}}
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({"models": [model]}))
    return str(path)


async def picture(client: AsyncClient, at_step_twenty: Callable[[], None]) -> GeneratedImage:
    """The picture of OPTIONS; something happens in the middle, and no step is seen twice or missed."""
    steps = []
    async for event in client.stream(OPTIONS):
        if isinstance(event, Progress) and event.stage == "denoiser":
            steps.append(event.step)
            if event.step == 20:
                at_step_twenty()
    assert steps == list(range(1, STEPS + 1))
    assert isinstance(event, GenerationResult)
    return event.images[0]


async def test_the_picture_is_the_same_and_no_step_is_computed_twice(manifest: str) -> None:
    async with run_cluster(manifest, gateway={"replica_wait_seconds": 0.1}) as cluster:
        assert cluster.client is not None
        undisturbed = await picture(cluster.client, lambda: None)
        image = await picture(cluster.client, lambda: os.kill(rank_processes()[1], signal.SIGKILL))
        assert image.data == undisturbed.data
        assert image.steps_recomputed == 0
        assert [stage.stage for stage in image.stages] == ["encoder", "denoiser", "denoiser", "decoder"]
        assert cluster.total("safelight_resumes_total", reason="restart") == 1
        assert cluster.total("safelight_rank_restarts_total") == 1


def test_a_killed_denoiser_leaves_no_ranks_behind(manifest: str, tmp_path: Path) -> None:
    denoiser = ServerProcess("services.denoiser", tmp_path / "log", f"--manifest={manifest}", "--device=cpu")
    denoiser.start()
    try:
        denoiser.wait_until_serving()
        ranks = rank_processes(denoiser.process.pid)
        assert len(ranks) == 2
    finally:
        denoiser.kill()
    until_gone(ranks)
