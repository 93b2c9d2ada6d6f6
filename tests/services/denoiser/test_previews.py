"""Laws of previews: small pictures of the prediction by a linear map, where the model has one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from safelight.errors import CheckpointError
from safelight.v1.denoiser_service_pb2 import DenoiseRequest
from safelight.v1.model_service_pb2 import GetModelRequest
from safelight.v1.model_service_pb2_grpc import ModelServiceStub
from services.common.manifest import DEMO_MODEL, DEMO_MODEL_PATH
from services.decoder.models.sd15 import load_sd15
from services.denoiser.previews import FILE_NAME, LatentPreviewMap, load_preview_map
from tests.support.running_denoiser import RunningDenoiser, StartDenoiser, kinds, latents_of
from tests.support.stage_requests import denoise_request

MAP = {"matrix": [[0.2, 0.0, 0.0, 0.0], [0.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.2, 0.1]], "bias": [0.5, 0.4, 0.3]}


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_preview_shows_each_latent_element_as_a_pixel_in_the_maps_colour() -> None:
    latents = torch.zeros(1, 4, 16, 24)
    latents[0, 0, :, 12:] = 2.0  # beyond 1 with the bias: cut to full red
    preview_map = LatentPreviewMap(0.5 * torch.eye(3, 4), torch.full((3,), 0.2))
    picture = pixels(preview_map.picture(latents))
    assert picture.shape == (16, 24, 3)
    assert np.abs(picture[:, :8].astype(int) - 51).max() <= 2
    assert np.abs(picture[:, 16:].astype(int) - [255, 51, 51]).max() <= 3


def test_a_preview_of_a_large_latent_is_some_kilobytes() -> None:
    smooth = torch.nn.functional.interpolate(torch.randn(1, 4, 8, 8), size=(128, 128), mode="bicubic")
    assert len(LatentPreviewMap(torch.randn(3, 4) / 4, torch.full((3,), 0.5)).picture(smooth)) < 16 * 1024


def test_without_a_file_there_is_no_map(tmp_path: Path) -> None:
    assert load_preview_map(tmp_path / FILE_NAME, 4) is None


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"matrix": [[1, 2], [3]], "bias": [0, 0, 0]},
        {"matrix": "blue", "bias": [0, 0, 0]},
        MAP | {"bias": [0.0, 0.0]},
        {"matrix": [[1.0] * 16] * 3, "bias": [0.0] * 3},
        MAP | {"bias": [0.0, 0.0, float("nan")]},
    ],
)
def test_a_file_that_is_no_map_for_the_model_is_refused_by_name(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=FILE_NAME):
        load_preview_map(path, 4)


def test_the_demo_models_map_is_that_of_its_vae() -> None:
    content = json.loads((DEMO_MODEL_PATH / FILE_NAME).read_text())
    assert content["vae_fingerprint"] == load_sd15(DEMO_MODEL, torch.device("cpu")).fingerprint
    assert load_preview_map(DEMO_MODEL_PATH / FILE_NAME, 4) is not None


@pytest.fixture
def manifest(tmp_path: Path, tiny_sd15: Path) -> str:
    """The tiny model with a map."""
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    path = tmp_path / "manifest.yaml"
    path.write_text(f"models: [{{name: tiny, path: {tiny_sd15}, latent_preview: {tmp_path / 'map.json'}}}]")
    return str(path)


async def can_preview(denoiser: RunningDenoiser) -> bool:
    response = await ModelServiceStub(denoiser.channel).GetModel(GetModelRequest(name="tiny"))
    return response.model.denoiser.previews


async def test_a_model_says_whether_it_can_make_previews(start: StartDenoiser, manifest: str) -> None:
    assert await can_preview(await start(manifest=manifest))
    assert not await can_preview(await start())


def with_previews(request: DenoiseRequest, every_steps: int) -> DenoiseRequest:
    request.preview.every_steps = every_steps
    return request


async def test_previews_come_every_so_many_steps_but_not_after_the_last_and_change_nothing(
    start: StartDenoiser, manifest: str
) -> None:
    denoiser = await start(manifest=manifest)
    plain = await denoiser.events(denoise_request(steps=6))
    events = await denoiser.events(with_previews(denoise_request(steps=6), every_steps=2))
    previews = [event.preview for event in events if event.HasField("preview")]
    assert [(preview.step, preview.media_type) for preview in previews] == [(2, "image/jpeg"), (4, "image/jpeg")]
    assert all(pixels(preview.data).shape == (8, 8, 3) for preview in previews)
    assert torch.equal(latents_of(events), latents_of(plain))
    assert denoiser.metric("safelight_preview_seconds_count") == 2


async def test_a_preview_shows_the_prediction_of_the_finished_latent(start: StartDenoiser, manifest: str) -> None:
    denoiser = await start(manifest=manifest)
    # The last step of Euler ends at its own prediction, and the prediction before it is close to that.
    request = with_previews(denoise_request(steps=40, scale=1.0), every_steps=39)
    events = await denoiser.events(request)
    preview_map = load_preview_map(Path(manifest).parent / "map.json", 4)
    assert preview_map is not None
    (shown,) = [pixels(event.preview.data) for event in events if event.HasField("preview")]
    final = pixels(preview_map.picture(latents_of(events)))
    assert np.abs(shown.astype(int) - final).mean() < 8


async def test_without_being_asked_for_there_are_no_previews(start: StartDenoiser, manifest: str) -> None:
    assert "preview" not in kinds(await (await start(manifest=manifest)).events(denoise_request(steps=3)))
