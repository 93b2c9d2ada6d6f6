"""Video-to-video through four services: diffusers' latents, sizes and lengths, receipts, resumption, bad films."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import WanVideoToVideoPipeline
from PIL import Image
from torch import Tensor

from safelight import (
    AsyncClient,
    GeneratedImage,
    GenerationOptions,
    GenerationResult,
    InvalidRequestError,
    Progress,
    load_video,
)
from services.common.exchange import tensor_store
from services.common.server import Server
from tests.support.cluster import Cluster, run_cluster
from tests.support.films import MP4, Pixels, film_file, moving_square
from tests.support.tiny_wan import save_tiny_wan
from tests.support.wan_reference import load_wan_pipeline, umt5_embeds

PROMPT, NEGATIVE, SEED, STEPS = "a red apple bouncing", "the blue ball", 1234, 6
WIDTH, HEIGHT, FRAMES = 96, 64, 9
FILM = moving_square(FRAMES, (WIDTH, HEIGHT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> str:
    path = folder.parent / "manifest.yaml"
    path.write_text(f"models:\n  - {{name: tiny, path: {folder}}}\n")
    return str(path)


def pictures(film: Pixels) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in film]


def client_of(cluster: Cluster) -> AsyncClient:
    assert cluster.client is not None
    return cluster.client


async def generate(cluster: Cluster, **options: Any) -> GeneratedImage:
    given: dict[str, Any] = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": 4.0, "seed": SEED}
    result = await client_of(cluster).generate(PROMPT, **{**given, **options})
    return result.images[0]


def diffusers_latents(pipeline: Any, film: list[Image.Image], strength: float) -> Tensor:
    latents: Tensor = pipeline(
        video=film,
        prompt_embeds=umt5_embeds(pipeline, PROMPT),
        negative_prompt_embeds=umt5_embeds(pipeline, NEGATIVE),
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        strength=strength,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
    ).frames
    return latents


@pytest.mark.filterwarnings("ignore")  # of the oracle
async def test_latents_equal_diffusers(folder: Path, manifest: str) -> None:
    """Where diffusers is told a strength for as many steps: its own rule runs one fewer, but for all of them."""
    pipeline = load_wan_pipeline(WanVideoToVideoPipeline, folder, steps=STEPS)
    async with run_cluster(manifest) as cluster:
        for strength, steps_run, theirs in ((0.5, 4, 0.7), (0.8, 5, 0.9), (1.0, 6, 1.0)):
            film = await generate(cluster, video=film_file(FILM), strength=strength, format="latents")
            latents = safetensors.torch.load(film.data)["latents"]
            expected = diffusers_latents(pipeline, pictures(FILM), theirs)
            assert film.steps == steps_run
            assert float((latents - expected).abs().max() / expected.abs().max()) < 1e-4


async def latents_of(cluster: Cluster, **options: Any) -> Tensor:
    film = await generate(cluster, strength=0.5, steps=2, format="latents", **options)
    latents: Tensor = safetensors.torch.load(film.data)["latents"]
    return latents


async def test_frames_and_their_files_make_the_same_latents(manifest: str, tmp_path: Path) -> None:
    lossless = film_file(FILM)
    (tmp_path / "film.mp4").write_bytes(lossless)
    async with run_cluster(manifest) as cluster:
        films = [pictures(FILM), lossless, tmp_path / "film.mp4", load_video(tmp_path / "film.mp4")]
        latents = [await latents_of(cluster, video=film) for film in films]
    assert all(torch.equal(latents[0], each) for each in latents[1:])


async def test_a_receipt_names_the_film_and_the_exact_class_makes_its_result_again(manifest: str) -> None:
    film = film_file(FILM, MP4)
    options = {"video": film, "determinism": "exact", "steps": 2}
    async with run_cluster(manifest) as cluster:
        first, again = [await generate(cluster, **options) for _ in range(2)]
    assert first.data == again.data
    assert first.receipt.strength == 0.8
    assert first.receipt.inputs == {"video": hashlib.sha256(film).hexdigest()}
    assert [stage.stage for stage in first.stages] == ["encoder", "decoder", "denoiser", "decoder"]


def at_work(servers: Sequence[Server], gauge: str, **labels: str) -> Server:
    """The server of a stage whose gauge is not 0."""
    (found,) = [server for server in servers if server.metrics.registry.get_sample_value(gauge, labels)]
    return found


async def test_a_lost_denoiser_changes_no_bit_and_nothing_is_left(
    manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_store, "MAX_INLINE_BYTES", 256)  # so that latents travel under leases
    options = GenerationOptions(prompt=PROMPT, video=film_file(FILM), steps=20, seed=1, determinism="exact")
    async with run_cluster(manifest, denoisers=2, gateway={"checkpoint_steps": 1}) as cluster:
        *_, whole = [event async for event in client_of(cluster).stream(options)]
        events = []
        async for event in client_of(cluster).stream(options):
            events.append(event)
            if isinstance(event, Progress) and (event.stage, event.step) == ("denoiser", 5):
                await at_work(cluster.denoisers, "safelight_running", stage="denoiser").stop()
        await cluster.until("safelight_leases", 0)
        encodes = cluster.total("safelight_requests_total", method="safelight.v1.DecoderService/EncodeFilm")
    result = events[-1]
    assert isinstance(whole, GenerationResult)
    assert isinstance(result, GenerationResult)
    assert result.images[0].data == whole.images[0].data
    assert encodes == 2  # once for each request, and not again for what went on from a checkpoint
    assert [stage.stage for stage in result.images[0].stages].count("denoiser") == 2


def padded(film: bytes, size: int) -> bytes:
    """An MP4 file with a box of so many bytes at its end that means nothing."""
    return film + size.to_bytes(4, "big") + b"free" + bytes(size - 8)


async def test_a_film_may_be_larger_than_other_messages_up_to_the_setting(manifest: str) -> None:
    film = film_file(FILM[:5])
    async with run_cluster(manifest, gateway={"max_film_bytes": 20_000_000}) as cluster:
        large = await generate(cluster, video=padded(film, 19_000_000), steps=1)
        with pytest.raises(InvalidRequestError, match=r"inputs\[0\].data: has \d+ bytes, not up to 20000000"):
            await generate(cluster, video=padded(film, 21_000_000), steps=1)
    assert large.receipt.num_frames == 5


@pytest.mark.parametrize(
    ("film", "options", "words"),
    [
        (b"no film", {}, r"inputs\[0\].data: \(MEDIA_ROLE_VIDEO\) must be an MP4, WebM or GIF file"),
        (film_file(FILM, MP4)[:2000], {}, r"inputs\[0\].data: .* is cut short or damaged"),
        (film_file(FILM), {"num_frames": 13}, "num_frames: is 13 and the film has 9: ask for 9, or give a longer film"),
        (film_file(FILM), {"strength": 1.5}, "strength: is 1.5; must be from 0 to 1"),
        (film_file(moving_square(10_000, (16, 16))), {"width": 1280, "height": 720}, "num_frames: the film has 10000"),
    ],
    ids=["no film", "cut", "short", "strength", "endless"],
)
async def test_what_no_film_can_be_made_of_is_refused_with_the_remedy(
    film: bytes, options: dict[str, Any], words: str, manifest: str
) -> None:
    async with run_cluster(manifest) as cluster:
        with pytest.raises(InvalidRequestError, match=words):
            await generate(cluster, video=film, **options)
        encodes = cluster.total("safelight_requests_total", method="safelight.v1.DecoderService/EncodeFilm")
    assert encodes == 0
