"""SDXL's UNet equals diffusers', from either layout, and is told of text and sizes as diffusers tells it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from safelight.errors import CheckpointError, InvalidRequestError
from safelight.v1.work_pb2 import SizeConditioning
from services.common.manifest import ModelEntry
from services.denoiser.conditioning import PromptConditioning
from services.denoiser.models.sd15 import load_sd15
from services.denoiser.models.sd_unet import SDUNet
from services.denoiser.models.sd_unet_keys import diffusers_sources, ldm_sources
from services.denoiser.models.sd_unet_params import params_from_config
from services.denoiser.models.sdxl import load_sdxl, told_sizes
from services.denoiser.models.unet_denoiser import Prepared, UNetDenoiser
from tests.support.ldm_layout import ldm_unet_name
from tests.support.tiny_sdxl import POOLED_WIDTH, UNET

CPU = torch.device("cpu")
SDXL: dict[str, Any] = UNET | {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}
SIZES = SizeConditioning(
    original_width=4096, original_height=2048, crop_left=8, crop_top=16, target_width=1024, target_height=512
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def reference() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


@pytest.fixture(scope="module")
def paths(reference: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The UNet in the diffusers layout, and in the original single file."""
    folder = tmp_path_factory.mktemp("models")
    reference.save_pretrained(folder / "model" / "unet")
    tensors = {ldm_unet_name(name, reference.config): tensor for name, tensor in reference.state_dict().items()}
    others = {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file({name: tensor.contiguous() for name, tensor in (tensors | others).items()}, folder / "x.safetensors")
    return {
        "folder": folder / "model",
        "single file": folder / "x.safetensors",
        "folder's file alone": folder / "model" / "unet" / "diffusion_pytorch_model.safetensors",
    }


def load(path: Path) -> UNetDenoiser:
    return load_sdxl(ModelEntry(name="tiny", path=str(path)), CPU)


def prompts() -> list[PromptConditioning]:
    """Two prompts' conditioning; the second is told other sizes."""
    generator = torch.Generator().manual_seed(1)
    return [
        PromptConditioning(
            {
                "prompt_embeds": torch.randn(1, 7, UNET["cross_attention_dim"], generator=generator),
                "pooled_prompt_embeds": torch.randn(1, POOLED_WIDTH, generator=generator),
            },
            "conditioning",
            (4, 16, 24),
            sizes=sizes,
        )
        for sizes in (None, SIZES)
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def predict(denoiser: UNetDenoiser, latents: Tensor, timesteps: Tensor) -> Tensor:
    rows: list[Prepared] = [denoiser.prepare(prompt) for prompt in prompts()]
    return denoiser.predict(latents, timesteps, rows)


@pytest.mark.parametrize("layout", ["folder", "single file", "folder's file alone"])
@pytest.mark.parametrize("size", [(16, 24), (11, 14)])
def test_equals_diffusers(
    reference: UNet2DConditionModel, paths: dict[str, Path], layout: str, size: tuple[int, int]
) -> None:
    latents, timesteps = torch.randn(2, 4, *size), torch.tensor([981.0, 3.5])
    actual = predict(load(paths[layout]), latents, timesteps)
    given = [prompt.tensors for prompt in prompts()]
    added = {
        "text_embeds": torch.cat([tensors["pooled_prompt_embeds"] for tensors in given]),
        "time_ids": torch.tensor([[128, 192, 0, 0, 128, 192], [2048, 4096, 16, 8, 512, 1024]]),
    }
    embeds = torch.cat([tensors["prompt_embeds"] for tensors in given])
    expected = reference(latents, timesteps, embeds, added_cond_kwargs=added).sample
    assert relative_error(actual, expected) < 1e-5


def test_both_layouts_give_the_same_bits(paths: dict[str, Path]) -> None:
    latents, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([981.0, 3.5])
    folder, *others = (predict(load(path), latents, timesteps) for path in paths.values())
    assert all(torch.equal(folder, other) for other in others)


def test_a_picture_s_own_sizes_are_told_where_the_request_tells_none() -> None:
    own, given = prompts()
    assert told_sizes(own) == (128, 192, 0, 0, 128, 192)
    assert told_sizes(given) == (2048, 4096, 16, 8, 512, 1024)


def test_it_says_that_it_is_told_sizes_and_what_it_needs(paths: dict[str, Path]) -> None:
    description = load(paths["folder"]).describe("tiny")
    assert (description.family, description.denoiser.size_conditioning) == ("sdxl", True)
    assert list(description.denoiser.conditioning) == ["prompt_embeds", "pooled_prompt_embeds"]
    assert (description.denoiser.default_latent_width, load(paths["single file"])._sample_size) == (16, 128)


@pytest.mark.parametrize("pooled", [None, torch.zeros(1, POOLED_WIDTH + 1), torch.zeros(1, 1, POOLED_WIDTH)])
def test_pooled_text_of_another_model_is_refused(paths: dict[str, Path], pooled: Tensor | None) -> None:
    (prompt, _) = prompts()
    tensors = {"prompt_embeds": prompt.tensors["prompt_embeds"]}
    if pooled is not None:
        tensors["pooled_prompt_embeds"] = pooled
    with pytest.raises(InvalidRequestError, match=r"^conditioning\.pooled_prompt_embeds: must be .* \[1, 96\]"):
        load(paths["folder"]).prepare(PromptConditioning(tensors, "conditioning", (4, 16, 16)))


def test_a_unet_of_another_family_is_refused(paths: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is not of family 'sd15'"):
        load_sd15(ModelEntry(name="tiny", path=str(paths["folder"])), CPU)


def test_the_name_maps_are_bijections_at_full_size() -> None:
    with torch.device("meta"):
        reference, unet = UNet2DConditionModel(**SDXL), SDUNet(params_from_config(SDXL))
    names = unet.state_dict().keys()
    diffusers, ldm = diffusers_sources(names, unet.params), ldm_sources(names, unet.params)
    assert sorted(itertools.chain(*diffusers.values())) == sorted(reference.state_dict())
    assert len(set(itertools.chain(*ldm.values()))) == len(list(itertools.chain(*ldm.values()))) == 1680
    assert {own: tuple(ldm_unet_name(name, SDXL) for name in diffusers[own]) for own in names} == ldm


@pytest.mark.parametrize(
    "options",
    [
        {"addition_embed_type": "text_image"},
        {"addition_embed_type": None},
        {"addition_time_embed_dim": None},
        {"projection_class_embeddings_input_dim": 1536},
        {"transformer_layers_per_block": (1, 2)},
        {"transformer_layers_per_block": ((1, 2), (1, 1), (3, 3))},
        {"reverse_transformer_layers_per_block": (1, 1, 1)},
    ],
)
def test_an_option_of_another_architecture_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(options))):
        params_from_config(SDXL | options)
