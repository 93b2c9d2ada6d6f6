"""Words to a film through four services: Wan2.1 equals diffusers' on the same weights and noise."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import WanPipeline
from torch import Tensor

from safelight import (
    AsyncClient,
    Event,
    GeneratedImage,
    GenerationOptions,
    InvalidRequestError,
    Progress,
    UnsupportedError,
)
from tests.support.cluster import run_cluster
from tests.support.tiny_wan import save_tiny_wan
from tests.support.wan_layout import save_original_files
from tests.support.wan_reference import load_wan_pipeline, umt5_embeds

PROMPT, NEGATIVE, SEED = "a red apple bouncing", "the blue ball", 1234
WIDTH, HEIGHT, FRAMES, STEPS = 96, 64, 9, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> str:
    """The model twice: the diffusers folder, and the same weights in Wan's own files."""
    files = folder.parent
    dit, vae, umt5 = save_original_files(folder, files)
    original = {
        "name": "original",
        "path": str(dit),
        "tokenizer": str(folder / "tokenizer"),
        "encoder": {"parts": {"umt5": {"path": str(umt5)}}},
        "decoder": {"path": str(vae)},
    }
    path = files / "manifest.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "tiny", "path": str(folder)}, original]}))
    return str(path)


def diffusers_latents(pipeline: Any) -> Tensor:
    latents: Tensor = pipeline(
        prompt_embeds=umt5_embeds(pipeline, PROMPT),
        negative_prompt_embeds=umt5_embeds(pipeline, NEGATIVE),
        width=WIDTH,
        height=HEIGHT,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
    ).frames
    return latents


async def generate(client: AsyncClient, model: str = "tiny", **options: Any) -> GeneratedImage:
    given: dict[str, Any] = {
        "negative_prompt": NEGATIVE,
        "width": WIDTH,
        "height": HEIGHT,
        "num_frames": FRAMES,
        "steps": STEPS,
        "guidance_scale": 4.0,
        "seed": SEED,
    }
    result = await client.generate(PROMPT, model=model, **{**given, **options})
    return result.images[0]


@pytest.mark.filterwarnings("ignore")  # of the oracle
async def test_latents_equal_diffusers(folder: Path, manifest: str) -> None:
    expected = diffusers_latents(load_wan_pipeline(WanPipeline, folder, steps=STEPS))
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        film = await generate(cluster.client, format="latents")
    latents = safetensors.torch.load(film.data)["latents"]
    assert latents.shape == (1, 16, 3, 8, 12)
    assert float((latents - expected).abs().max() / expected.abs().max()) < 1e-4


def what_ffmpeg_says(film: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(film), "-f", "null", "-"]
    return subprocess.run(command, capture_output=True, check=True).stderr.decode()


async def test_wans_own_files_make_the_same_film(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        films = [await generate(cluster.client, model, metadata=False) for model in ("tiny", "original")]
    assert films[0].data == films[1].data


async def test_a_film_plays_at_its_speed_and_its_receipt_tells_how_it_was_made(manifest: str, tmp_path: Path) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        film = await generate(cluster.client, fps=12.0)
    assert film.media_type == "video/mp4"
    assert (film.receipt.format, film.receipt.num_frames, film.receipt.fps) == ("mp4", FRAMES, 12.0)
    (tmp_path / "film.mp4").write_bytes(film.data)
    told = await asyncio.to_thread(what_ffmpeg_says, tmp_path / "film.mp4")
    assert f"{WIDTH}x{HEIGHT}" in told
    assert "12 fps" in told
    assert f"frame={FRAMES:5d}" in told


async def test_the_decoder_tells_its_latent_frames_and_stops_when_the_client_leaves(manifest: str) -> None:
    options = GenerationOptions(
        prompt=PROMPT, model="tiny", width=WIDTH, height=HEIGHT, num_frames=401, steps=1, guidance_scale=1.0
    )
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        async with aclosing(cluster.client.stream(options)) as events:
            told = [event async for event in until_decoded(events, 3)]
        await generate(cluster.client, num_frames=5, steps=1)  # the decoder is free again
        begun = cluster.total("safelight_batch_size_count", stage="decoder")
    assert [(each.step, each.steps) for each in told if each.stage == "decoder"] == [
        (0, 101),
        (1, 101),
        (2, 101),
        (3, 101),
    ]
    assert begun < 50


async def until_decoded(events: AsyncIterator[Event], step: int) -> AsyncIterator[Progress]:
    """The progress of a film up to a latent frame."""
    async for event in events:
        if isinstance(event, Progress):
            yield event
            if (event.stage, event.step) == ("decoder", step):
                return


async def test_the_exact_class_makes_the_same_file_again(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        films = [await generate(cluster.client, determinism="exact") for _ in range(2)]
    assert films[0].data == films[1].data


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_frames": 8}, InvalidRequestError, "try 9"),
    ({"num_frames": 80}, InvalidRequestError, "num_frames: is 80; must be one more than a multiple of 4: try 81"),
    ({"num_frames": -3}, InvalidRequestError, "try 1"),
    ({"num_frames": 40_001}, InvalidRequestError, "a film of this size may have"),
    ({"num_frames": 10_000, "width": 832, "height": 480}, InvalidRequestError, "num_frames: is 10000; a film of"),
    ({"width": 8, "height": 8}, InvalidRequestError, "at least 64"),
    ({"width": 104}, InvalidRequestError, "multiple of 16"),
    ({"fps": 1000.0}, InvalidRequestError, "fps: is 1000; must be from 1 to 120"),
    ({"fps": -1.0}, InvalidRequestError, "fps: is -1; must be from 1 to 120"),
    ({"fps": 1e-9}, InvalidRequestError, "fps: is 1e-09; must be from 1 to 120"),
    ({"fps": float("nan")}, InvalidRequestError, "fps: is nan"),
    ({"width": 17, "height": 15}, InvalidRequestError, "height: is 15; must be a multiple of 16, at least 64"),
    ({"width": 32_768, "height": 64, "num_frames": 1}, InvalidRequestError, "along a side"),
    ({"format": "png"}, InvalidRequestError, "OUTPUT_FORMAT_MP4"),
    ({"preview_every_steps": 1}, UnsupportedError, "preview"),
]


async def test_what_no_film_can_be_is_refused_with_the_remedy(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        for options, error, words in REFUSED:
            with pytest.raises(error, match=words):
                await generate(cluster.client, **options)
