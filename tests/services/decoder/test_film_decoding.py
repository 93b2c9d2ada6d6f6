"""Films through the decoder's real server: files, metadata, memory, and callers that go away."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from safelight.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NonFiniteError,
    UnsupportedError,
    from_rpc_error,
)
from safelight.v1 import work_pb2
from safelight.v1.decoder_service_pb2 import DecodeRequest, DecodeResult, EncodeImageRequest
from safelight.v1.decoder_service_pb2_grpc import DecoderServiceStub
from services.decoder.images import to_pixels
from services.decoder.service import build_decoder
from services.decoder.settings import DecoderSettings
from tests.serving import Running, StartStage, failure
from tests.support.stage_requests import decode_request
from tests.support.tiny_wan import save_tiny_wan

LATENT_FRAMES, FRAMES = 3, 9
LATENTS = torch.randn(1, 16, LATENT_FRAMES, 6, 8, generator=torch.Generator().manual_seed(0))

LONG = LATENTS.repeat(1, 1, 200, 1, 1)  # some 10 seconds of work

Start = Callable[..., Awaitable[DecoderServiceStub]]
StartRunning = Callable[..., Awaitable[Running]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture
def start_running(start_stage: StartStage, model: Path, tmp_path: Path) -> StartRunning:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(f"models:\n  - {{name: tiny, path: {model}}}\n")

    async def start_decoder(**settings: Any) -> Running:
        return await start_stage(DecoderSettings(manifest=str(manifest), device="cpu", **settings), build_decoder)

    return start_decoder


@pytest.fixture
def start(start_running: StartRunning) -> Start:
    async def start_decoder(**settings: Any) -> DecoderServiceStub:
        return DecoderServiceStub((await start_running(**settings)).channel)

    return start_decoder


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where films are written."""
    folder = tmp_path / "films"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def request(latents: Tensor = LATENTS, **output: Any) -> DecodeRequest:
    wanted = decode_request(latents)
    wanted.output.CopyFrom(work_pb2.OutputOptions(**output))
    wanted.parameters.prompt = "a red apple bouncing"
    return wanted


async def decode(stub: DecoderServiceStub, wanted: DecodeRequest, timeout: float = 60) -> tuple[bytes, DecodeResult]:
    events = [event async for event in stub.Decode(wanted, timeout=timeout)]
    return b"".join(event.chunk.data for event in events[:-1]), events[-1].result


def frames_of(archive: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    files = zipfile.ZipFile(io.BytesIO(archive))
    names = sorted(name for name in files.namelist() if name.endswith(".png"))
    return np.stack([np.asarray(Image.open(io.BytesIO(files.read(name)))) for name in names])


@torch.inference_mode()
def reference_frames(model: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    mean, std = (LATENTS.new_tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    film = vae.decode(LATENTS * std + mean).sample[0]
    return np.stack([to_pixels(frame) for frame in film.unbind(1)])


async def test_the_frames_are_those_that_diffusers_decodes(start: Start, model: Path) -> None:
    data, result = await decode(await start(), request(format=work_pb2.OUTPUT_FORMAT_PNG_FRAMES))
    assert (result.width, result.height, result.frames) == (64, 48, FRAMES)
    difference = frames_of(data).astype(int) - reference_frames(model)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("file_format", "media_type"),
    [
        (work_pb2.OUTPUT_FORMAT_UNSPECIFIED, "video/mp4"),
        (work_pb2.OUTPUT_FORMAT_WEBM, "video/webm"),
        (work_pb2.OUTPUT_FORMAT_GIF, "image/gif"),
    ],
)
async def test_a_film_leaves_as_one_file(
    file_format: work_pb2.OutputFormat.ValueType, media_type: str, start: Start
) -> None:
    data, result = await decode(await start(), request(format=file_format))
    assert result.media_type == media_type
    assert result.file_size == len(data) > 0
    assert result.timing.compute_seconds > 0


async def test_the_file_tells_how_it_was_made_unless_it_shall_not(start: Start) -> None:
    stub = await start()
    told, _ = await decode(stub, request())
    untold, _ = await decode(stub, request(omit_metadata=True))
    assert b"a red apple bouncing" in told
    assert b"a red apple bouncing" not in untold


async def test_tiles_change_a_film_little(start: Start) -> None:
    latents = torch.randn(1, 16, 2, 24, 24, generator=torch.Generator().manual_seed(1))
    wanted = request(latents, format=work_pb2.OUTPUT_FORMAT_PNG_FRAMES)
    whole = frames_of((await decode(await start(), wanted))[0]).astype(int)
    tiled = frames_of((await decode(await start(tile_size=16, tile_overlap=8, untiled_area=0), wanted))[0])
    assert np.abs(whole - tiled).mean() < 0.1 * whole.std()  # the attention sees a tile instead of the frame


async def test_every_latent_frame_is_told_before_the_file_comes(start: Start) -> None:
    events = [event async for event in (await start()).Decode(request(), timeout=60)]
    told = [(event.progress.step, event.progress.steps) for event in events if event.HasField("progress")]
    assert told == [(step, LATENT_FRAMES) for step in range(1, LATENT_FRAMES + 1)]
    assert all(event.HasField("progress") for event in events[:LATENT_FRAMES])


async def test_a_caller_that_goes_away_stops_the_work_within_one_latent_frame(
    start_running: StartRunning, films: Path
) -> None:
    running = await start_running()
    stub = DecoderServiceStub(running.channel)
    call = stub.Decode(request(LONG), timeout=60)
    async for event in call:
        if event.progress.step == 2:
            break
    told = begun(running)
    assert ffmpeg_processes() == 1
    call.cancel()
    assert await is_clean(stub, films)
    assert begun(running) <= told + 2  # one was told late, one was under way


async def test_a_film_whose_time_is_up_is_stopped_within_one_latent_frame(
    start_running: StartRunning, films: Path
) -> None:
    running = await start_running()
    stub = DecoderServiceStub(running.channel)
    late = await _failure(stub, request(LONG), timeout=0.5)
    assert isinstance(late, DeadlineExceededError)
    assert await is_clean(stub, films)
    so_far = begun(running)
    assert so_far < LONG.shape[2]
    await decode(stub, request())
    assert begun(running) == so_far + LATENT_FRAMES  # nothing of the first went on


async def is_clean(stub: DecoderServiceStub, films: Path) -> bool:
    """Whether neither files nor a process of a film are left, soon after it was given up."""
    for _ in range(20):
        if not has_leftovers(films):
            return True
        await decode(stub, request(LATENTS[:, :, :1], format=work_pb2.OUTPUT_FORMAT_LATENTS))
    return False


def has_leftovers(films: Path) -> bool:
    """Whether there is a file of a film, or a process."""
    return any(films.iterdir()) or ffmpeg_processes() > 0


def begun(running: Running) -> int:
    """Latent frames that the device has begun."""
    count = running.server.metrics.registry.get_sample_value("safelight_batch_size_count", {"stage": "decoder"})
    return int(count or 0)


def ffmpeg_processes() -> int:
    """Processes of ffmpeg that this one has started and not yet seen the end of."""
    children = Path("/proc/self/task").glob("*/children")
    numbers = [number for listed in children for number in listed.read_text().split()]
    return sum("ffmpeg" in Path(f"/proc/{number}/cmdline").read_text() for number in numbers)


async def test_what_is_no_film_is_refused(start: Start) -> None:
    stub = await start()
    picture = await _failure(stub, request(LATENTS[:, :, 0]))
    assert isinstance(picture, InvalidRequestError)
    assert "must be [1, 16, frames, height, width]" in str(picture)
    png = await _failure(stub, request(format=work_pb2.OUTPUT_FORMAT_PNG))
    assert isinstance(png, InvalidRequestError)
    assert "OUTPUT_FORMAT_MP4" in str(png)
    broken = await _failure(stub, request(LATENTS * float("nan")))
    assert isinstance(broken, NonFiniteError)
    image = await failure(stub.EncodeImage(EncodeImageRequest(model="tiny", image=b"x"), timeout=60))
    assert isinstance(image, UnsupportedError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda wanted: setattr(wanted.parameters, "fps", -1.0), "parameters.fps: is -1; must be from 1 to 120"),
        (lambda wanted: setattr(wanted.parameters, "fps", 1000.0), "parameters.fps: is 1000"),
        (lambda wanted: setattr(wanted.output, "format", 99), "output.format: is 99; choose from OUTPUT_FORMAT_MP4"),
        (lambda wanted: setattr(wanted.output, "quality", 101), "output.quality: is 101"),
        (
            lambda wanted: wanted.latents.CopyFrom(request(torch.zeros(1, 16, 1, 1, 2049)).latents),
            "latents: is 16392 pixels; a film may have 16384",
        ),
        (
            lambda wanted: wanted.latents.CopyFrom(request(torch.zeros(1, 8, 1, 4, 4)).latents),
            "latents: has shape .* must be .1, 16, frames, height, width",
        ),
    ],
)
async def test_what_no_film_can_be_is_refused_by_its_field(
    change: Callable[[DecodeRequest], None], words: str, start: Start
) -> None:
    wanted = request()
    change(wanted)
    with pytest.raises(InvalidRequestError, match=words):
        raise await _failure(await start(), wanted)


async def _failure(stub: DecoderServiceStub, wanted: DecodeRequest, timeout: float = 60) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await decode(stub, wanted, timeout)
    return from_rpc_error(caught.value)
