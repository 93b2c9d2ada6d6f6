"""The model that ships with the repository: small, and drawn alike by us and by the reference implementation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from services.common.manifest import DEMO_MODEL, DEMO_MODEL_PATH
from services.decoder.images import to_pixels
from services.decoder.models.sd15 import load_sd15
from services.decoder.tiling import Tiling
from tests.support.cluster import run_cluster

MEGABYTE = 1_000_000


def pixels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)


def psnr(ours: np.ndarray[tuple[int, ...], np.dtype[np.float64]], theirs: object) -> float:
    return float(10 * np.log10(255**2 / np.square(ours - np.asarray(theirs, dtype=np.float64)).mean()))


def test_it_is_small_enough_to_ship() -> None:
    sizes = [file.stat().st_size for file in Path(DEMO_MODEL_PATH).rglob("*") if file.is_file()]
    assert sum(sizes) < 40 * MEGABYTE


@pytest.mark.filterwarnings("ignore")  # of the oracle
async def test_four_services_draw_the_picture_that_diffusers_draws() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_MODEL_PATH, torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    theirs = pipeline("a cat", num_inference_steps=10, guidance_scale=4.0, generator=generator).images[0]
    async with run_cluster("") as cluster:
        assert cluster.client is not None
        result = await cluster.client.generate("a cat", steps=10, guidance_scale=4.0, seed=7)
    assert psnr(pixels(result.images[0].data), theirs) > 45  # rounding to 8 bits alone gives about 60


def test_its_large_pictures_are_tiled_without_visible_seams() -> None:
    decoder = load_sd15(DEMO_MODEL, torch.device("cpu"))
    image = torch.zeros(1, 3, 256, 256)
    image[..., 64:192, 64:192] = 1.0
    whole = Tiling(untiled_area=32 * 32)
    latents = decoder.encode(image, whole)
    in_one, in_tiles = (
        to_pixels(decoder.decode(latents, tiling)[0]).astype(np.float64)
        for tiling in (whole, Tiling(tile=24, overlap=8, untiled_area=1))
    )
    assert psnr(in_tiles, in_one) > 25
