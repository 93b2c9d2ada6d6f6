"""Wan's text conditioning against transformers' UMT5 with the same random weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from safelight.errors import CheckpointError
from safelight.v1.work_pb2 import MEDIA_ROLE_IMAGE
from services.common.manifest import Component, ModelEntry, Part
from services.encoder.models.t5 import load_t5
from services.encoder.models.wan import UMT5_TOKENS, WanEncoder, cleaned
from services.modeling.weights import open_checkpoint
from tests.support.gguf_layout import save_gguf
from tests.support.scaled_layout import scaled, unscaled
from tests.support.tiny_wan import IMAGE_TOKENS, IMAGE_WIDTH, save_tiny_wan, save_tiny_wan_i2v
from tests.support.wan_layout import save_original_clip, save_original_umt5

CPU = torch.device("cpu")
PROMPTS = ["a red apple bouncing", "the cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "tiny")


@pytest.fixture(scope="module")
def reference(folder: Path) -> UMT5EncoderModel:
    return UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()


@pytest.fixture(scope="module")
def encoder(folder: Path) -> WanEncoder:
    return WanEncoder.load(ModelEntry(name="tiny", path=str(folder), encoder=Component(dtype="float32")), CPU)


@torch.inference_mode()
def reference_embeds(folder: Path, reference: UMT5EncoderModel, prompt: str) -> Tensor:
    """As Wan's own code: all 512 tokens computed, those after the end set to zero."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"))
    ids = [*tokenizer.encode(prompt, add_special_tokens=False), 1]
    token_ids = torch.tensor([ids + [0] * (UMT5_TOKENS - len(ids))])
    mask = (torch.arange(UMT5_TOKENS) < len(ids)).long()[None]
    embeds: Tensor = reference(token_ids, mask).last_hidden_state
    return embeds * mask[..., None]


def embeds_of(encoder: WanEncoder, *prompts: str) -> list[Tensor]:
    return [row["prompt_embeds"] for row in encoder.encode([encoder.tokenize(prompt) for prompt in prompts], 1)]


def test_embeddings_equal_transformers_of_all_tokens(
    folder: Path, reference: UMT5EncoderModel, encoder: WanEncoder
) -> None:
    for ours, prompt in zip(embeds_of(encoder, *PROMPTS), PROMPTS, strict=True):
        theirs = reference_embeds(folder, reference, prompt)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_prompt_does_not_depend_on_its_batch(encoder: WanEncoder) -> None:
    for together, prompt in zip(embeds_of(encoder, *PROMPTS), PROMPTS, strict=True):
        alone = embeds_of(encoder, prompt)[0]
        assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_wans_own_names_load_to_the_same_weights(folder: Path, reference: UMT5EncoderModel, tmp_path: Path) -> None:
    file = save_original_umt5(folder / "text_encoder", reference.encoder.state_dict(), tmp_path / "umt5.safetensors")
    assert "blocks.1.pos_embedding.embedding.weight" in open_checkpoint(file)
    assert "blocks.0.ffn.gate.0.weight" in open_checkpoint(file)
    config = reference.config.to_dict()
    loaded = [
        load_t5(open_checkpoint(path), config, device=CPU, dtype=torch.float32)
        for path in (file, folder / "text_encoder")
    ]
    ours, theirs = (encoder.state_dict() for encoder in loaded)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def weights_of(file: Path) -> dict[str, Tensor]:
    return load_t5(open_checkpoint(file), None, device=CPU, dtype=torch.float32).state_dict()


def test_a_gguf_file_is_dequantized_on_load(reference: UMT5EncoderModel, tmp_path: Path) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, len(reference.encoder.block))
    tensors = {
        str(names.get_name(name, try_suffixes=(".weight",))): tensor
        for name, tensor in reference.state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    assert "enc.blk.1.attn_rel_b.weight" in tensors
    read = save_gguf(tmp_path / "umt5.gguf", tensors, GGMLQuantizationType.Q8_0)
    save_file(read, tmp_path / "umt5.safetensors")
    ours, plain = (weights_of(tmp_path / f"umt5.{suffix}") for suffix in ("gguf", "safetensors"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_comfyui_s_scaled_file_loads_and_its_tokenizer_is_left_alone(
    reference: UMT5EncoderModel, tmp_path: Path
) -> None:
    weights = {name: each for name, each in reference.state_dict().items() if name != "encoder.embed_tokens.weight"}
    stored = scaled(weights)
    save_file({**stored, "spiece_model": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "scaled.safetensors")
    save_file(unscaled(stored), tmp_path / "plain.safetensors")
    ours, plain = (weights_of(tmp_path / f"{name}.safetensors") for name in ("scaled", "plain"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_the_official_pth_files_load_where_the_manifest_allows_it(folder: Path, tmp_path: Path) -> None:
    led = save_tiny_wan_i2v(tmp_path / "led")
    reference = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    files = {
        "umt5": save_original_umt5(folder / "text_encoder", reference.encoder.state_dict(), tmp_path / "umt5.tmp"),
        "image_encoder": save_original_clip(led / "image_encoder", tmp_path / "clip.tmp"),
    }
    for part, file in files.items():
        torch.save(load_file(file), tmp_path / f"{part}.pth")

    def load(*, allow_pickle: bool) -> WanEncoder:
        parts = {part: Part(path=str(tmp_path / f"{part}.pth"), allow_pickle=allow_pickle) for part in files}
        entry = ModelEntry(name="tiny", path=str(led), encoder=Component(dtype="float32", parts=parts))
        return WanEncoder.load(entry, CPU)

    with pytest.raises(CheckpointError, match=r"umt5\.pth is a pickle file.*allow_pickle: true"):
        load(allow_pickle=False)
    ours = load(allow_pickle=True)
    theirs = WanEncoder.load(ModelEntry(name="tiny", path=str(led), encoder=Component(dtype="float32")), CPU)
    assert torch.equal(embeds_of(ours, "a cat")[0], embeds_of(theirs, "a cat")[0])
    assert torch.equal(image_embeds_of(ours, 1)[0], image_embeds_of(theirs, 1)[0])


def test_the_prompt_is_cleaned_as_for_training() -> None:
    assert cleaned("  a  \n cat &amp;amp; a dog’s “toy” ") == 'a cat & a dog\'s "toy"'


def test_a_prompt_that_does_not_fit_is_cut_and_told(encoder: WanEncoder) -> None:
    prompt = encoder.tokenize("a cat " * 300)
    assert len(prompt.ids) == UMT5_TOKENS
    assert prompt.cut_off.endswith("a cat")


def test_a_missing_tokenizer_is_an_error_with_the_remedy(folder: Path) -> None:
    entry = ModelEntry(name="tiny", path=str(folder), tokenizer=str(folder / "vae"))
    with pytest.raises(CheckpointError, match="umt5-xxl"):
        WanEncoder.load(entry, CPU)


def image_embeds_of(encoder: WanEncoder, count: int) -> list[Tensor]:
    assert encoder.image_encoder is not None
    picture = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    pixels = [encoder.image_encoder.pixels(picture + index) for index in range(count)]
    return [row["image_embeds"] for row in encoder.image_encoder.encode(pixels)]


def test_a_folder_with_an_image_encoder_takes_pictures_and_a_named_file_is_the_same(
    folder: Path, encoder: WanEncoder, tmp_path: Path
) -> None:
    led = save_tiny_wan_i2v(tmp_path / "led")
    file = save_original_clip(led / "image_encoder", tmp_path / "clip.safetensors")
    named = Component(parts={"image_encoder": Part(path=str(file))})
    of_folder = WanEncoder.load(ModelEntry(name="led", path=str(led)), CPU)
    of_file = WanEncoder.load(ModelEntry(name="tiny", path=str(folder), encoder=named), CPU)
    theirs, ours = image_embeds_of(of_folder, 2), image_embeds_of(of_file, 2)
    assert theirs[0].shape == (1, IMAGE_TOKENS, IMAGE_WIDTH)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert of_file.fingerprint not in (encoder.fingerprint, of_folder.fingerprint)
    assert list(of_file.describe("tiny").encoder.inputs) == [MEDIA_ROLE_IMAGE]


def test_a_model_of_words_has_no_image_encoder(encoder: WanEncoder) -> None:
    assert encoder.image_encoder is None
    assert len(encoder.weights) == 1
