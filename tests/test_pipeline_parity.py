"""The whole pipeline, through four services, equals diffusers' on the same weights and noise, from either layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from safelight import AsyncClient, GeneratedImage
from services.denoiser.sampling.variance_preserving import VariancePreserving
from tests.support.cluster import run_cluster
from tests.support.ldm_layout import save_single_file
from tests.support.tiny_sd15 import CLIP_TOKENIZER, save_tiny_sd15

PROMPT, NEGATIVE, SEED = "a photograph of an astronaut riding a horse", "blurry", 1234
# 999 is divisible by steps - 1, so diffusers' timesteps are whole and both interpolate nothing.
STEPS = 10
TIMESTEPS = list(range(999, -1, -111))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> str:
    """The model twice: the diffusers folder, and the same weights in the original single file."""
    single_file = save_single_file(folder, folder.parent / "tiny.safetensors")
    models = [
        {"name": "folder", "path": str(folder)},
        {"name": "single-file", "path": str(single_file), "tokenizer": str(CLIP_TOKENIZER)},
    ]
    path = folder.parent / "manifest.yaml"
    path.write_text(yaml.safe_dump({"models": models}))
    return str(path)


def load_pipeline(folder: Path, scheduler: object) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_latents(pipeline: Any, **arguments: Any) -> Tensor:
    given: dict[str, Any] = {"width": 128, "height": 96, "num_inference_steps": STEPS, "output_type": "latent"}
    latents: Tensor = pipeline(generator=torch.Generator("cpu").manual_seed(SEED), **{**given, **arguments}).images
    return latents


def dpmpp_2m_arguments() -> dict[str, Any]:
    """Left to itself, diffusers' DPM++ takes another spacing, and unit noise where its first sigma asks for less."""
    sigma = VariancePreserving().sigma_max
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator("cpu").manual_seed(SEED))
    return {"timesteps": TIMESTEPS, "latents": noise * sigma / (sigma**2 + 1) ** 0.5}


def skipped_clip_embeds(pipeline: Any) -> Tensor:
    """The prompt's hidden states before the last layer, through the final norm, by transformers alone."""
    tokens = pipeline.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt")
    text_model = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    hidden_states = pipeline.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    embeds: Tensor = text_model.final_layer_norm(hidden_states[-2])
    return embeds


async def generate(client: AsyncClient, model: str, **options: Any) -> GeneratedImage:
    given: dict[str, Any] = {"negative_prompt": NEGATIVE, "width": 128, "height": 96, "steps": STEPS, "seed": SEED}
    result = await client.generate(PROMPT, model=model, **{**given, **options})
    return result.images[0]


def read_latents(image: GeneratedImage) -> Tensor:
    latents: Tensor = safetensors.torch.load(image.data)["latents"]
    return latents


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Our sampler and schedule by the case's name: what makes diffusers' scheduler, and what it is given.
CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "euler scaled_linear": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "euler_ancestral scaled_linear": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "euler karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler exponential": (EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    "dpmpp_2m scaled_linear": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
}


@pytest.mark.filterwarnings("ignore")  # of the oracle
@pytest.mark.parametrize("case", CASES)
async def test_latents_equal_diffusers(folder: Path, manifest: str, case: str) -> None:
    make, arguments = CASES[case]
    pipeline = load_pipeline(folder, make(**BETAS, **arguments))
    own = dpmpp_2m_arguments() if make is DPMSolverMultistepScheduler else {}
    expected = diffusers_latents(pipeline, prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=5.0, **own)
    sampler, schedule = case.split()
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        options = {"sampler": sampler, "schedule": schedule, "guidance_scale": 5.0, "format": "latents"}
        image = await generate(cluster.client, "folder", **options)
    assert relative_error(read_latents(image), expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
async def test_without_guidance_and_with_clip_skip(folder: Path, manifest: str) -> None:
    pipeline = load_pipeline(folder, EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"))
    expected = diffusers_latents(pipeline, prompt_embeds=skipped_clip_embeds(pipeline), guidance_scale=1.0)
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        image = await generate(cluster.client, "folder", guidance_scale=1.0, clip_skip=2, format="latents")
    assert relative_error(read_latents(image), expected) < 1e-4


async def test_both_layouts_give_the_same_bits(manifest: str) -> None:
    async with run_cluster(manifest) as cluster:
        assert cluster.client is not None
        pictures = [await generate(cluster.client, model, metadata=False) for model in ("folder", "single-file")]
    assert pictures[0].data == pictures[1].data
