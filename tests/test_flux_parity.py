"""FLUX.1 through four services equals diffusers on the same weights and noise, from any layout."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image
from torch import Tensor

from safelight import AsyncClient, GeneratedImage
from safelight.errors import InvalidRequestError
from tests.support.cluster import run_cluster
from tests.support.flux_layout import original_flux_tensors, save_all_in_one_file
from tests.support.tiny_flux import save_tiny_flux

PROMPT, NEGATIVE, SEED = "a photograph of an astronaut riding a horse", "blurry", 1234
WIDTH, HEIGHT = 128, 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_flux(root / name, schnell=name == "schnell") for name in ("dev", "schnell")}


@pytest.fixture(scope="module")
def manifest(folders: dict[str, Path]) -> str:
    """Both folders; dev in one file; and dev's transformer in a file of its own, with the rest from the folder."""
    dev, root = folders["dev"], folders["dev"].parent
    one_file = save_all_in_one_file(dev, root / "one.safetensors")
    transformer = safetensors.torch.load_file(dev / "transformer" / "diffusion_pytorch_model.safetensors")
    alone = root / "flux1-dev.safetensors"
    safetensors.torch.save_file(original_flux_tensors(transformer), alone)
    parts = {"clip_l": {"path": str(dev / "text_encoder")}, "t5": {"path": str(dev / "text_encoder_2")}}
    models: list[dict[str, Any]] = [
        *({"name": name, "path": str(folder)} for name, folder in folders.items()),
        {"name": "one-file", "path": str(one_file)},
        {
            "name": "by-parts",
            "path": str(alone),
            "encoder": {"parts": parts},
            "decoder": {"path": str(dev / "vae")},
        },
    ]
    path = root / "manifest.yaml"
    path.write_text(yaml.safe_dump({"models": models}))
    return str(path)


def diffusers_latents(folder: Path, **arguments: Any) -> Tensor:
    """diffusers' latents [1, 16, h, w]."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    size = {"width": WIDTH, "height": HEIGHT}
    packed = pipeline(PROMPT, generator=generator, output_type="latent", **size, **arguments).images
    latents: Tensor = pipeline._unpack_latents(packed, HEIGHT, WIDTH, 8)
    return latents


async def generate(client: AsyncClient, model: str, **options: Any) -> GeneratedImage:
    given: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "seed": SEED, "steps": 5}
    result = await client.generate(PROMPT, model=model, **{**given, **options})
    return result.images[0]


def read_latents(image: GeneratedImage) -> Tensor:
    latents: Tensor = safetensors.torch.load(image.data)["latents"]
    return latents


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.filterwarnings("ignore")  # of the oracle
async def test_latents_equal_diffusers(folders: dict[str, Path], manifest: str) -> None:
    dev = diffusers_latents(folders["dev"], num_inference_steps=5, guidance_scale=2.5)
    guided = diffusers_latents(
        folders["dev"], num_inference_steps=5, true_cfg_scale=3.0, negative_prompt=NEGATIVE, guidance_scale=3.5
    )
    schnell = diffusers_latents(folders["schnell"], num_inference_steps=4)
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        options = {"format": "latents"}
        ours_dev = await generate(cluster.client, "dev", distilled_guidance_scale=2.5, **options)
        ours_guided = await generate(cluster.client, "dev", guidance_scale=3.0, negative_prompt=NEGATIVE, **options)
        ours_schnell = await generate(cluster.client, "schnell", steps=None, **options)
    assert relative_error(read_latents(ours_dev), dev) < 1e-4
    assert relative_error(read_latents(ours_guided), guided) < 1e-4
    assert relative_error(read_latents(ours_schnell), schnell) < 1e-4
    assert relative_error(dev, guided) > 0.01


async def test_every_layout_gives_the_same_bits(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        pictures = [
            await generate(cluster.client, model, metadata=False, determinism="exact")
            for model in ("dev", "one-file", "by-parts")
        ]
    assert pictures[0].data == pictures[1].data == pictures[2].data


async def test_requests_of_different_guidance_share_a_batch_and_equal_the_singles(manifest: str) -> None:
    scales, steps = (1.0, 2.5, 3.5, 6.0), (3, 5, 4, 6)
    async with run_cluster(manifest) as cluster:
        client = cluster.client
        assert client is not None

        async def one(index: int) -> Tensor:
            options = {"distilled_guidance_scale": scales[index], "steps": steps[index], "seed": index}
            return read_latents(await generate(client, "dev", format="latents", **options))

        together = await asyncio.gather(*map(one, range(4)))
        alone = [await one(index) for index in range(4)]
    for ours, expected in zip(together, alone, strict=True):
        assert relative_error(ours, expected) < 1e-4


async def test_a_model_says_what_it_takes(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        models = {model.name: model for model in await cluster.client.models()}
        dev, schnell = models["dev"], models["schnell"]
        assert (dev.family, dev.size_multiple, dev.width, dev.max_tokens) == ("flux", 16, 1024, 512)
        assert (dev.steps, dev.guidance_scale, dev.distilled_guidance_scale) == (30, 1.0, 3.5)
        assert (schnell.steps, schnell.guidance_scale, schnell.distilled_guidance_scale) == (4, 1.0, None)
        assert (dev.schedules[0], schnell.schedules[0]) == ("flow_dynamic", "flow")
        with pytest.raises(InvalidRequestError, match=r"guidance\.distilled_scale.*leave it out"):
            await generate(cluster.client, "schnell", distilled_guidance_scale=3.5)
        with pytest.raises(InvalidRequestError, match=r"width: is 136; must be a multiple of 16.* try 128"):
            await generate(cluster.client, "dev", width=136)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
async def test_pictures_to_start_from_equal_diffusers(folders: dict[str, Path], manifest: str, masked: bool) -> None:
    """diffusers' strength 0.6 runs 3 of 5 steps, as our 0.4 does."""
    photo = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (0, 0, WIDTH // 2, HEIGHT))
    pipeline = (FluxInpaintPipeline if masked else FluxImg2ImgPipeline).from_pretrained(folders["dev"])
    pipeline.set_progress_bar_config(disable=True)
    vae = pipeline.vae
    with torch.no_grad():
        mean = vae.encode(torch.from_numpy(photo).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
    picture = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    arguments: dict[str, Any] = {"image": picture, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 3.5}
    arguments |= {"mask_image": mask, "masked_image_latents": picture} if masked else {}
    generator = torch.Generator("cpu").manual_seed(SEED)
    size = {"width": WIDTH, "height": HEIGHT}
    packed = pipeline(PROMPT, generator=generator, output_type="latent", **size, **arguments).images
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        options = {"image": Image.fromarray(photo), "strength": 0.4, "format": "latents"}
        ours = await generate(cluster.client, "dev", mask=mask if masked else None, **options)
    assert relative_error(read_latents(ours), pipeline._unpack_latents(packed, HEIGHT, WIDTH, 8)) < 1e-4


async def test_what_a_mask_keeps_is_kept(manifest: str) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    mask = Image.new("L", (1, 2), 255)
    mask.putpixel((0, 1), 0)
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        image = await generate(cluster.client, "dev", image=Image.fromarray(photo), mask=mask, steps=2)
    ours = np.asarray(image.image)
    np.testing.assert_array_equal(ours[HEIGHT // 2 :], photo[HEIGHT // 2 :])
    assert not np.array_equal(ours[: HEIGHT // 2], photo[: HEIGHT // 2])
