"""Laws of finding a component: where its weights are, of which family they are, and what is wrong if they are not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.errors import CheckpointError
from services.common.manifest import Component, ModelEntry
from services.modeling import components
from services.modeling.components import (
    configure_torch,
    detect_family,
    open_component,
    read_json,
    resolve_device,
    resolve_dtype,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SD15 = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SDXL = "model.diffusion_model.label_emb.0.0.weight"
REFINER = "conditioner.embedders.0.model.ln_final.weight"
SD2 = "cond_stage_model.model.ln_final.weight"


def entry(path: Path, family: str = "") -> ModelEntry:
    return ModelEntry(name="mine", path=str(path), family=family)


def single_file(path: Path, keys: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.zeros(1) for key in keys}, path)
    return path


def diffusers_folder(path: Path, **files: Mapping[str, object]) -> Path:
    """A folder with a UNet of one tensor, and JSON files, `__` for the slash."""
    single_file(path / "unet/diffusion_pytorch_model.safetensors", ["conv_in.weight"])
    for name, content in files.items():
        (path / f"{name.replace('__', '/')}.json").write_text(json.dumps(content))
    return path


def test_a_single_file_is_the_checkpoint_of_every_component(tmp_path: Path) -> None:
    file = single_file(tmp_path / "mine.safetensors", [SD15])
    source = open_component(entry(file), Component(), "unet")
    assert (source.checkpoint.files, source.config) == ((file,), None)


def test_in_a_folder_a_component_has_a_folder_and_a_config_of_its_own(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "mine", unet__config={"in_channels": 4})
    source = open_component(entry(folder), Component(), "unet")
    assert list(source.checkpoint) == ["conv_in.weight"]
    assert source.config == {"in_channels": 4}


def test_a_folder_without_a_config_has_none(tmp_path: Path) -> None:
    assert open_component(entry(diffusers_folder(tmp_path)), Component(), "unet").config is None


def test_a_component_s_own_path_goes_before_the_model_s(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path / "mine")
    file = single_file(tmp_path / "vae.safetensors", ["decoder.conv_in.weight"])
    assert open_component(entry(folder), Component(path=str(file)), "vae").checkpoint.files == (file,)


def test_of_several_files_the_later_go_before_the_earlier(tmp_path: Path) -> None:
    whole = single_file(tmp_path / "whole.safetensors", [SD15, "a"])
    patch = tmp_path / "patch.safetensors"
    save_file({"a": torch.ones(2)}, patch)
    mine = ModelEntry(name="mine", path=(str(whole), str(patch)))
    checkpoint = open_component(mine, Component(), "unet").checkpoint
    assert detect_family(mine) == "sd15"
    assert (set(checkpoint), checkpoint.shape("a")) == ({SD15, "a"}, (2,))


def test_a_component_s_own_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    own = diffusers_folder(tmp_path / "other", unet__config={"in_channels": 9}) / "unet"
    source = open_component(entry(tmp_path / "absent"), Component(path=str(own)), "unet")
    assert source.config == {"in_channels": 9}


@pytest.mark.parametrize("path", ["absent", "absent.safetensors"])
def test_a_path_that_does_not_exist_is_named_with_its_model(tmp_path: Path, path: str) -> None:
    sentence = f"model 'mine': {tmp_path / path} does not exist"
    with pytest.raises(CheckpointError, match=sentence):
        open_component(entry(tmp_path / path), Component(), "unet")
    with pytest.raises(CheckpointError, match=sentence):
        open_component(entry(tmp_path), Component(path=str(tmp_path / path)), "unet")
    with pytest.raises(CheckpointError, match=sentence):
        detect_family(entry(tmp_path / path))


def test_a_folder_without_the_component_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'vae'} does not exist") as caught:
        open_component(entry(diffusers_folder(tmp_path)), Component(), "vae")
    assert caught.value.metadata == {"file": str(tmp_path / "vae")}


def test_weights_that_are_cut_short_are_an_error_of_safelight(tmp_path: Path) -> None:
    file = single_file(tmp_path / "mine.safetensors", [SD15])
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"mine\.safetensors is not a whole safetensors file"):
        open_component(entry(file), Component(), "unet")


def test_the_manifest_s_family_goes_before_all_else(tmp_path: Path) -> None:
    assert detect_family(entry(tmp_path / "absent", family="flux")) == "flux"


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [("StableDiffusionPipeline", "sd15"), ("StableDiffusionXLPipeline", "sdxl"), ("FluxPipeline", "flux")],
)
def test_a_folder_s_family_is_told_by_its_pipeline(tmp_path: Path, pipeline: str, family: str) -> None:
    folder = diffusers_folder(tmp_path, model_index={"_class_name": pipeline})
    assert detect_family(entry(folder)) == family


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ([SD15], "sd15"),
        ([SDXL], "sdxl"),
        ([SD15, SDXL], "sdxl"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "flux"),
        (["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"], "flux"),
        (["single_transformer_blocks.0.attn.norm_k.weight"], "flux"),
    ],
)
def test_a_single_file_s_family_is_told_by_its_keys(tmp_path: Path, keys: list[str], family: str) -> None:
    assert detect_family(entry(single_file(tmp_path / "a.safetensors", [*keys, "first_stage_model.x"]))) == family


@pytest.mark.parametrize(
    ("keys", "what"),
    [([SDXL, REFINER], "SDXL's refiner"), ([SD15, SD2], "Stable Diffusion 2"), (["x"], "of no known family")],
)
def test_a_file_of_another_family_is_an_error_that_names_it(tmp_path: Path, keys: list[str], what: str) -> None:
    file = single_file(tmp_path / "a.safetensors", keys)
    with pytest.raises(
        CheckpointError, match=rf"model 'mine': {file} is {what}.*; this release serves .*sd15"
    ) as caught:
        detect_family(entry(file))
    assert caught.value.metadata == {"file": str(file)}


def test_a_folder_of_another_pipeline_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path, model_index={"_class_name": "StableDiffusionXLImg2ImgPipeline"})
    with pytest.raises(CheckpointError, match=r"is pipeline 'StableDiffusionXLImg2Img.*; this release serves .*sd15"):
        detect_family(entry(folder))


def test_a_folder_without_an_index_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder without model_index\.json"):
        detect_family(entry(diffusers_folder(tmp_path)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b'{"a": ', "not valid JSON"), (b"[1]", "must hold a JSON object"), (b'{"a": "\xff"}', "not valid JSON")],
)
def test_a_broken_json_file_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}: {sentence}") as caught:
        read_json(file)
    assert caught.value.metadata == {"file": str(file)}


def test_auto_is_a_gpu_when_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_is_taken_by_name() -> None:
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["abacus", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"device {name!r} is not on this machine"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", CPU, torch.float32),
        ("auto", GPU, torch.float16),
        ("float32", GPU, torch.float32),
        ("bfloat16", GPU, torch.bfloat16),
        ("float16", CPU, torch.float16),
    ],
)
def test_auto_is_half_precision_on_a_gpu_only(name: str, device: torch.device, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, device) == dtype


def test_auto_is_the_half_precision_of_the_family_on_a_gpu() -> None:
    assert resolve_dtype("auto", GPU, torch.bfloat16) == torch.bfloat16
    assert resolve_dtype("auto", CPU, torch.bfloat16) == torch.float32


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_float32_on_a_cpu_that_is_slow_at_it(
    monkeypatch: pytest.MonkeyPatch, is_fast: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(components, "bfloat16_is_fast", lambda: is_fast)
    assert resolve_dtype("bfloat16", CPU) == dtype


def test_threads_are_bounded_where_a_number_is_given() -> None:
    before = torch.get_num_threads()
    try:
        configure_torch("cpu", 2)
        configure_torch("cpu", 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
