"""SDXL through four services equals diffusers on the same weights and noise, from either layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor

from safelight import AsyncClient, GeneratedImage, InvalidRequestError
from tests.support.cluster import run_cluster
from tests.support.ldm_layout import save_single_file
from tests.support.tiny_sdxl import save_tiny_sdxl

PROMPT, SEED = "a photograph of an astronaut riding a horse", 1234
STEPS = 10  # 999 is divisible by steps - 1, so diffusers' timesteps are whole and both interpolate nothing
SIZE: dict[str, Any] = {"width": 128, "height": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> str:
    """The model three times: its folder, the original single file, and the file with text encoders of their own."""
    single_file = save_single_file(folder, folder.parent / "tiny.safetensors")
    parts = {
        "clip_l": {"path": str(folder / "text_encoder" / "model.safetensors")},
        "clip_g": {"path": str(folder / "text_encoder_2" / "model.safetensors")},
    }
    models = [
        {"name": "folder", "path": str(folder)},
        {"name": "single-file", "path": str(single_file)},
        {"name": "parts", "path": str(single_file), "encoder": {"parts": parts}},
    ]
    path = folder.parent / "manifest.yaml"
    path.write_text(yaml.safe_dump({"models": models}))
    return str(path)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, scheduler=scheduler, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_output(pipeline: Any, **arguments: Any) -> Any:
    given = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", **SIZE, **arguments}
    return pipeline(generator=torch.Generator("cpu").manual_seed(SEED), **given).images


async def generate(client: AsyncClient, model: str, **options: Any) -> GeneratedImage:
    given: dict[str, Any] = {"steps": STEPS, "seed": SEED, "format": "latents", **SIZE, **options}
    result = await client.generate(PROMPT, model=model, **given)
    return result.images[0]


def read_latents(image: GeneratedImage) -> Tensor:
    latents: Tensor = safetensors.torch.load(image.data)["latents"]
    return latents


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Our options by the case's name, and diffusers' arguments; sizes there are (height, width).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "empty negative prompt": ({"guidance_scale": 5.0}, {"guidance_scale": 5.0}),
    "negative prompt": (
        {"guidance_scale": 5.0, "negative_prompt": "blurry"},
        {"guidance_scale": 5.0, "negative_prompt": "blurry"},
    ),
    "guidance of 1": ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    "guidance of 0, as turbo models want it": ({"guidance_scale": 0.0}, {"guidance_scale": 0.0}),
    "clip_skip": ({"guidance_scale": 5.0, "clip_skip": 3}, {"guidance_scale": 5.0, "clip_skip": 1}),
    "told sizes": (
        {"guidance_scale": 5.0, "original_size": (512, 1024), "crop": (8, 16), "target_size": (256, 320)},
        {
            "guidance_scale": 5.0,
            "original_size": (1024, 512),
            "crops_coords_top_left": (16, 8),
            "target_size": (320, 256),
        },
    ),
}


@pytest.mark.filterwarnings("ignore")  # of the oracle
async def test_latents_equal_diffusers(pipeline: Any, manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        errors = {
            case: relative_error(
                read_latents(await generate(cluster.client, "folder", **options)),
                diffusers_output(pipeline, **arguments),
            )
            for case, (options, arguments) in CASES.items()
        }
    assert {case: error for case, error in errors.items() if error >= 1e-4} == {}


@pytest.mark.filterwarnings("ignore")
async def test_the_picture_of_a_single_file_equals_diffusers(pipeline: Any, manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        image = await generate(cluster.client, "single-file", guidance_scale=5.0, format="png")
    expected = diffusers_output(pipeline, guidance_scale=5.0, output_type="np")[0]
    assert np.abs(np.asarray(image.image) / 255 - expected).max() <= 1 / 255


async def test_every_layout_gives_the_same_bits(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        pictures = [await generate(cluster.client, model) for model in ("folder", "single-file", "parts")]
    assert len({picture.data for picture in pictures}) == 1


async def test_a_picture_remembers_the_sizes_that_the_model_was_told(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        image = await generate(cluster.client, "folder", steps=1, crop=(8, 0), format="png")
        with pytest.raises(InvalidRequestError, match=r"size_conditioning\.crop_left: is -1"):
            await generate(cluster.client, "folder", steps=1, crop=(-1, 0))
    assert (image.receipt.original_size, image.receipt.crop) == ((128, 96), (8, 0))
    text = image.image.info["parameters"]
    assert "Crop: 8x0" in text
    assert "Original size" not in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
async def test_pictures_to_start_from_equal_diffusers(pipeline: Any, manifest: str, masked: bool) -> None:
    """diffusers' strength 0.6 runs 6 of 10 steps, as our 0.5 does."""
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    mask = Image.new("L", (128, 96))
    mask.paste(255, (0, 0, 64, 96))
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        picture = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    kind = StableDiffusionXLInpaintPipeline if masked else StableDiffusionXLImg2ImgPipeline
    changing = kind.from_pipe(pipeline)
    changing.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    if masked:
        arguments |= {"mask_image": mask, "masked_image_latents": picture, **SIZE}
    generator = torch.Generator("cpu").manual_seed(SEED)
    expected = changing(PROMPT, image=picture, strength=0.6, generator=generator, **arguments).images
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        options = {"image": Image.fromarray(photo), "strength": 0.5, "guidance_scale": 5.0}
        ours = await generate(cluster.client, "folder", mask=mask if masked else None, **options)
    assert relative_error(read_latents(ours), expected) < 1e-4
