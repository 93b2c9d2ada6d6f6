"""Pictures and words to a film through four services: image-to-video, first and last frame, and three keyframes equal
diffusers' on the same weights and noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import (
    WanImageToVideoPipeline,
)
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, CLIPImageProcessor, CLIPVisionModel

from safelight import AsyncClient, GeneratedImage
from tests.support.cluster import run_cluster
from tests.support.tiny_wan import save_tiny_wan_i2v
from tests.support.wan_layout import save_original_clip, save_original_files
from tests.support.wan_reference import load_wan_pipeline, umt5_embeds

PROMPT, NEGATIVE, SEED = "a red apple bouncing", "the blue ball", 1234
WIDTH, HEIGHT, FRAMES, STEPS, SCALE = 96, 64, 9, 4, 4.0
SHIFTS = {"i2v": 5.0, "flf2v": 16.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"i2v": save_tiny_wan_i2v(root / "i2v"), "flf2v": save_tiny_wan_i2v(root / "flf2v", pictures=2)}


@pytest.fixture(scope="module")
def manifest(folders: dict[str, Path]) -> str:
    """Each model twice: the diffusers folder, and the same weights in Wan's own files."""
    path = folders["i2v"].parent / "manifest.yaml"
    models = [{"name": name, "path": str(folder)} for name, folder in folders.items()]
    models += [in_wans_own_files(name, folder) for name, folder in folders.items()]
    path.write_text(yaml.safe_dump({"models": models}))
    return str(path)


def in_wans_own_files(name: str, folder: Path) -> dict[str, Any]:
    files = folder.parent / f"{name} files"
    files.mkdir()
    dit, vae, umt5 = save_original_files(folder, files)
    clip = save_original_clip(folder / "image_encoder", files / "clip.safetensors")
    return {
        "name": f"{name}-original",
        "path": str(dit),
        "tokenizer": str(folder / "tokenizer"),
        "encoder": {"parts": {"umt5": {"path": str(umt5)}, "image_encoder": {"path": str(clip)}}},
        "decoder": {"path": str(vae)},
    }


def picture(seed: int) -> Image.Image:
    """Smooth colours, of the film's size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


PICTURES = [picture(seed) for seed in range(3)]


class WanPixels:
    """What CLIP sees by Wan's own code: squeezed, not cropped, without antialiasing."""

    def __call__(self, images: Any, return_tensors: str = "pt") -> BatchFeature:
        given = images if isinstance(images, list) else [images]
        levels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in given])
        squeezed = torch.nn.functional.interpolate(levels, (56, 56), mode="bicubic", align_corners=False) * 0.5 + 0.5
        usual = CLIPImageProcessor()
        mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (usual.image_mean, usual.image_std))
        return BatchFeature({"pixel_values": (squeezed - mean) / deviation})


def load_pipeline(folder: Path) -> Any:
    """diffusers' pipeline with the model's own shift."""
    clip = CLIPVisionModel.from_pretrained(folder / "image_encoder")
    own = {"image_encoder": clip, "image_processor": WanPixels()}
    return load_wan_pipeline(WanImageToVideoPipeline, folder, steps=STEPS, shift=SHIFTS[folder.name], **own)


def diffusers_latents(pipeline: Any, pictures: Sequence[Image.Image]) -> Tensor:
    latents: Tensor = pipeline(
        image=pictures[0],
        last_image=pictures[1] if len(pictures) > 1 else None,
        prompt_embeds=umt5_embeds(pipeline, PROMPT),
        negative_prompt_embeds=umt5_embeds(pipeline, NEGATIVE),
        width=WIDTH,
        height=HEIGHT,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
    ).frames
    return latents


@torch.inference_mode()
def keyframe_latents(pipeline: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """The film of any number of keyframes by diffusers' networks; its pipeline takes no more than two."""
    places = torch.linspace(0, FRAMES - 1, len(pictures)).long().tolist()
    film, given = torch.zeros(1, 3, FRAMES, HEIGHT, WIDTH), torch.zeros(FRAMES)
    for place, each in zip(places, pictures, strict=True):
        film[0, :, place] = torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1
        given[place] = 1
    mean, deviation = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in _statistics(pipeline.vae))
    shown = (pipeline.vae.encode(film).latent_dist.mode() - mean) / deviation
    of_latents = torch.cat([given[:1].repeat(4), given[1:]]).view(-1, 4).T[None, :, :, None, None]
    condition = torch.cat([of_latents.expand(1, 4, *shown.shape[2:]), shown], dim=1)
    pixels = WanPixels()(list(pictures))["pixel_values"]
    states = pipeline.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
    image = states.reshape(1, -1, states.shape[-1])
    latents = torch.randn(shown.shape, generator=torch.Generator().manual_seed(SEED))
    pipeline.scheduler.set_timesteps()
    for time in pipeline.scheduler.timesteps:
        positive, negative = (
            pipeline.transformer(
                torch.cat([latents, condition], dim=1), time[None], umt5_embeds(pipeline, words), image
            )[0]
            for words in (PROMPT, NEGATIVE)
        )
        latents = pipeline.scheduler.step(negative + SCALE * (positive - negative), time, latents)[0]
    return latents


def _statistics(vae: Any) -> tuple[list[float], list[float]]:
    return vae.config.latents_mean, vae.config.latents_std


async def generate(client: AsyncClient, model: str, pictures: Sequence[Image.Image], **options: Any) -> GeneratedImage:
    given: dict[str, Any] = {
        "image": list(pictures),
        "negative_prompt": NEGATIVE,
        "width": WIDTH,
        "height": HEIGHT,
        "num_frames": FRAMES,
        "steps": STEPS,
        "guidance_scale": SCALE,
        "seed": SEED,
    }
    result = await client.generate(PROMPT, model=model, **{**given, **options})
    return result.images[0]


def latents_of(film: GeneratedImage) -> Tensor:
    latents: Tensor = safetensors.torch.load(film.data)["latents"]
    return latents


@pytest.mark.filterwarnings("ignore")  # of the oracle
@pytest.mark.parametrize(("model", "count"), [("i2v", 1), ("flf2v", 2), ("i2v", 3)])
async def test_latents_equal_diffusers_in_both_layouts(
    model: str, count: int, folders: dict[str, Path], manifest: str
) -> None:
    oracle = keyframe_latents if count > 2 else diffusers_latents
    expected = oracle(load_pipeline(folders[model]), PICTURES[:count])
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        films = [
            await generate(cluster.client, name, PICTURES[:count], format="latents")
            for name in (model, f"{model}-original")
        ]
    latents = [latents_of(film) for film in films]
    assert latents[0].shape == (1, 16, 3, 8, 12)
    assert torch.equal(*latents)
    assert float((latents[0] - expected).abs().max() / expected.abs().max()) < 1e-4
