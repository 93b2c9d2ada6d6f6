"""Films and keyframes to latents through the decoder's real server: parity, bad input, and callers that go away."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from safelight.errors import InternalError, InvalidRequestError, UnsupportedError
from safelight.v1.decoder_service_pb2 import EncodeFilmRequest
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceStub
from safelight.v1.tensor_pb2 import TensorRef
from services.decoder.service import build_decoder
from services.decoder.settings import DecoderSettings
from tests.serving import StartStage, failure
from tests.support.films import MP4, Pixels, film_file, moving_square
from tests.support.tiny_wan import save_tiny_wan

SIZE, FRAMES = (64, 48), 9
TOLERANCE = 1e-5

Start = Callable[..., Awaitable[DecoderServiceStub]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture(autouse=True)
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where films lie while they are read."""
    folder = tmp_path / "films"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def start(start_stage: StartStage, model: Path, tiny_sd15: Path, tmp_path: Path) -> Start:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(f"models:\n  - {{name: tiny, path: {model}}}\n  - {{name: pictures, path: {tiny_sd15}}}\n")

    async def start_decoder(**settings: Any) -> DecoderServiceStub:
        running = await start_stage(DecoderSettings(manifest=str(manifest), device="cpu", **settings), build_decoder)
        return DecoderServiceStub(running.channel)

    return start_decoder


def request(**fields: Any) -> EncodeFilmRequest:
    return EncodeFilmRequest(**{"model": "tiny", "width": SIZE[0], "height": SIZE[1], "num_frames": FRAMES, **fields})


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def values(ref: TensorRef) -> Tensor:
    return torch.frombuffer(bytearray(ref.inline), dtype=torch.float32).reshape(tuple(ref.header.shape))


@torch.inference_mode()
def reference_latents(model: Path, film: Tensor) -> Tensor:
    """diffusers' latents of frames [T, 3, H, W] in [-1, 1]."""
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    mean, std = (film.new_tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents: Tensor = (vae.encode(film.permute(1, 0, 2, 3)[None]).latent_dist.mode() - mean) / std
    return latents


def frames(film: Pixels) -> Tensor:
    return torch.from_numpy(film).permute(0, 3, 1, 2) / 127.5 - 1


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


async def test_a_film_becomes_the_latents_that_diffusers_makes_of_its_frames(start: Start, model: Path) -> None:
    film = moving_square(FRAMES, SIZE)
    response = await (await start()).EncodeFilm(request(film=film_file(film)), timeout=60)
    latents = values(response.latents)
    assert list(latents.shape) == [1, 16, 3, 6, 8]
    assert difference(latents, reference_latents(model, frames(film))) <= TOLERANCE
    assert response.timing.compute_seconds > 0


async def test_frames_of_another_size_are_scaled_as_pillow_scales_them(start: Start, model: Path) -> None:
    film = moving_square(5, (100, 62))
    response = await (await start()).EncodeFilm(request(film=film_file(film), num_frames=5), timeout=60)
    scaled = np.stack([np.asarray(Image.fromarray(frame).resize(SIZE, Image.Resampling.LANCZOS)) for frame in film])
    assert difference(values(response.latents), reference_latents(model, frames(scaled))) <= TOLERANCE


async def test_between_keyframes_the_film_is_grey(start: Start, model: Path) -> None:
    first, last = picture(1), picture(2, (90, 90))
    response = await (await start()).EncodeFilm(request(keyframes=[png(first), png(last)]), timeout=60)
    film = torch.zeros(FRAMES, 3, SIZE[1], SIZE[0])
    film[0] = frames(np.asarray(first)[None].copy())[0]
    film[8] = frames(np.asarray(last.resize(SIZE, Image.Resampling.LANCZOS))[None].copy())[0]
    assert difference(values(response.latents), reference_latents(model, film)) <= TOLERANCE
    assert list(response.keyframe_indices) == [0, 8]


async def test_of_a_longer_film_the_first_frames_are_taken(start: Start) -> None:
    stub, film = await start(), moving_square(20, SIZE)
    longer = await stub.EncodeFilm(request(film=film_file(film), num_frames=5), timeout=60)
    exact = await stub.EncodeFilm(request(film=film_file(film[:5]), num_frames=5), timeout=60)
    assert torch.equal(values(longer.latents), values(exact.latents))


async def test_tiles_change_latents_little(start: Start) -> None:
    film = film_file(moving_square(5, (128, 128)))
    wanted = request(film=film, num_frames=5, width=128, height=128)
    whole = values((await (await start()).EncodeFilm(wanted, timeout=60)).latents)
    stub = await start(tile_size=12, tile_overlap=6, untiled_area=0)
    tiled = values((await stub.EncodeFilm(wanted, timeout=60)).latents)
    assert (whole - tiled).abs().mean() < 0.1 * whole.std()


async def test_a_film_cut_short_is_an_error_and_leaves_nothing_behind(start: Start, films: Path) -> None:
    film = film_file(moving_square(FRAMES, SIZE), MP4)
    error = await failure((await start()).EncodeFilm(request(film=film[: len(film) // 2]), timeout=60))
    assert isinstance(error, InvalidRequestError)
    assert [violation.field for violation in error.violations] == ["film"]
    assert nothing_in(films)


async def test_a_model_of_pictures_takes_no_film(start: Start) -> None:
    stub = await start()
    error = await failure(stub.EncodeFilm(request(model="pictures", keyframes=[png(picture(0))]), timeout=60))
    assert isinstance(error, UnsupportedError)


def nothing_in(folder: Path) -> bool:
    return not any(folder.iterdir())


def is_running(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is in the folder."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (process / "cwd").readlink().is_relative_to(folder):
                found.append(int(process.name))
    return found


async def test_a_caller_that_goes_away_leaves_no_process_behind(start: Start, films: Path) -> None:
    stub, long = await start(), film_file(moving_square(401, SIZE))
    call = stub.EncodeFilm(request(film=long, num_frames=401), timeout=60)
    running = asyncio.ensure_future(call.code())
    while not (readers := processes_in(films)):
        assert not running.done()
        await stub.EncodeFilm(request(keyframes=[png(picture(0))], num_frames=1), timeout=60)
    call.cancel()
    while not nothing_in(films):
        await stub.EncodeFilm(request(keyframes=[png(picture(0))], num_frames=1), timeout=60)
    assert not any(is_running(reader) for reader in readers)


async def test_when_ffmpeg_dies_the_call_says_so_and_the_next_one_is_served(start: Start, films: Path) -> None:
    stub, long = await start(), film_file(moving_square(401, SIZE))
    call = asyncio.ensure_future(failure(stub.EncodeFilm(request(film=long, num_frames=401), timeout=60)))
    while not (readers := processes_in(films)):
        assert not call.done()
        await asyncio.sleep(0)
    os.kill(readers[0], signal.SIGKILL)
    error = await call
    assert isinstance(error, InternalError)
    assert "ffmpeg was ended by signal 9" in str(error)
    assert nothing_in(films)
    await stub.EncodeFilm(request(film=long), timeout=60)
