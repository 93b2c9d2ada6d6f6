"""SDXL's text conditioning equals diffusers', from either layout and from files of the text models alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from safelight.errors import CheckpointError
from services.common.manifest import Component, ModelEntry, Part
from services.encoder.models.sdxl import SDXLEncoder
from tests.support.ldm_layout import save_single_file
from tests.support.tiny_sdxl import POOLED_WIDTH, save_tiny_sdxl

PROMPT = "a photograph of an astronaut riding a horse"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def single_file(folder: Path) -> Path:
    return save_single_file(folder, folder.parent / "tiny.safetensors")


def load(path: Path, **fields: Any) -> SDXLEncoder:
    return SDXLEncoder.load(ModelEntry(name="tiny", path=str(path), **fields), CPU)


def encode(encoder: SDXLEncoder, prompt: str, clip_skip: int = 2, *, negative: bool = False) -> Mapping[str, Tensor]:
    return encoder.encode([encoder.tokenize(prompt, negative=negative)], clip_skip)[0]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.filterwarnings("ignore")  # of the oracle
@pytest.mark.parametrize("layout", ["folder", "single file"])
@pytest.mark.parametrize("prompt", [PROMPT, "", "cat " * 100])
@torch.inference_mode()
def test_the_tensors_equal_diffusers(folder: Path, single_file: Path, layout: str, prompt: str) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, vae=None, unet=None)
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    ours = encode(load(folder if layout == "folder" else single_file), prompt)
    assert relative_error(ours["prompt_embeds"], embeds) < 1e-5
    assert relative_error(ours["pooled_prompt_embeds"], pooled) < 1e-5


@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_clip_skip_counts_from_the_last_layer_where_diffusers_counts_from_the_one_before(folder: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, vae=None, unet=None)
    embeds, _, _, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False, clip_skip=1)
    encoder = load(folder)
    assert encoder.describe("tiny").encoder.default_clip_skip == 2
    assert relative_error(encode(encoder, PROMPT, clip_skip=3)["prompt_embeds"], embeds) < 1e-5


def test_zeros_stand_for_an_empty_negative_prompt_only(folder: Path) -> None:
    encoder = load(folder)
    prompts = [encoder.tokenize(""), encoder.tokenize("", negative=True), encoder.tokenize("blurry", negative=True)]
    encoded = encoder.encode(prompts, 2)
    assert [bool(tensors["prompt_embeds"].any()) for tensors in encoded] == [True, False, True]
    assert [bool(tensors["pooled_prompt_embeds"].any()) for tensors in encoded] == [True, False, True]
    assert {tensors["prompt_embeds"].shape for tensors in encoded} == {(1, 77, 192)}
    assert {tensors["pooled_prompt_embeds"].shape for tensors in encoded} == {(1, POOLED_WIDTH)}


def test_a_model_that_was_not_trained_with_zeros_encodes_the_empty_prompt(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("unet", "vae"))
    index = (folder / "model_index.json").read_text()
    changed = index.replace('"force_zeros_for_empty_prompt": true', '"force_zeros_for_empty_prompt": false')
    assert changed != index
    (tmp_path / "model" / "model_index.json").write_text(changed)
    encoder = load(tmp_path / "model")
    zeroed, whole = encode(encoder, "", negative=True), encode(encoder, "")
    assert torch.equal(zeroed["prompt_embeds"], whole["prompt_embeds"])


def test_both_text_models_may_lie_in_files_of_their_own(folder: Path, single_file: Path) -> None:
    parts = {
        "clip_l": Part(path=str(folder / "text_encoder" / "model.safetensors")),
        "clip_g": Part(path=str(folder / "text_encoder_2" / "model.safetensors")),
    }
    elsewhere = load(single_file.parent, encoder=Component(parts=parts))
    expected = load(folder)
    assert elsewhere.fingerprint == expected.fingerprint
    for name, tensor in encode(elsewhere, PROMPT).items():
        assert relative_error(tensor, encode(expected, PROMPT)[name]) < 1e-5


def test_a_part_computes_in_its_own_dtype(folder: Path) -> None:
    parts = {"clip_g": Part(dtype="float16")}
    encoded = encode(load(folder, encoder=Component(parts=parts)), PROMPT)
    assert (encoded["prompt_embeds"].dtype, encoded["pooled_prompt_embeds"].dtype) == (torch.float32, torch.float16)


def test_a_file_without_clip_g_is_refused_by_name(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    with pytest.raises(CheckpointError, match="no whole CLIP-G text model"):
        load(file, family="sdxl")
