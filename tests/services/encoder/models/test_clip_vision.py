"""CLIP's image encoder against transformers' with the same random weights, in every layout."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel

from services.common.picture_pixels import read_pixels
from services.encoder.models.clip_vision import ClipImageEncoder, load_clip_vision
from services.modeling.components import read_json
from services.modeling.weights import CheckpointError, open_checkpoint
from tests.support.tiny_wan import IMAGE_TOKENS, IMAGE_WIDTH, tiny_clip_vision
from tests.support.wan_layout import save_original_clip

CPU = torch.device("cpu")
OLD_NAMES = "vision_model."  # of files that transformers 4 wrote


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "image_encoder"
    tiny_clip_vision().save_pretrained(folder)
    return folder


def load(path: Path, *, with_config: bool = False) -> ClipImageEncoder:
    config = read_json(path / "config.json") if with_config else None
    return load_clip_vision(open_checkpoint(path), config, device=CPU, dtype=torch.float32)


def rewritten(folder: Path, file: Path, prefix: str) -> Path:
    """The folder's weights under other names."""
    weights = load_file(folder / "model.safetensors")
    save_file({prefix + name.removeprefix(OLD_NAMES): tensor for name, tensor in weights.items()}, file)
    return file


@torch.inference_mode()
def reference(folder: Path, pixels: Tensor) -> Tensor:
    """The hidden states before the last block, as diffusers takes them."""
    model = CLIPVisionModel.from_pretrained(folder).eval()
    states: Tensor = model(pixels, output_hidden_states=True).hidden_states[-2]
    return states


def test_embeddings_equal_transformers_before_the_last_block(folder: Path) -> None:
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    ours, theirs = load(folder, with_config=True)(pixels), reference(folder, pixels)
    assert ours.shape == (2, IMAGE_TOKENS, IMAGE_WIDTH)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_layout_loads_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    expected = load(folder, with_config=True).state_dict()
    files = [
        save_original_clip(folder, tmp_path / "wan.safetensors"),
        save_original_clip(folder, tmp_path / "mirror.safetensors", "model.visual."),
        rewritten(folder, tmp_path / "old.safetensors", OLD_NAMES),
        rewritten(folder, tmp_path / "new.safetensors", ""),
    ]
    for file in files:
        loaded = load(file)
        assert (loaded.size, loaded.model.config.num_attention_heads) == (56, 2)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_the_last_block_stays_in_the_file(folder: Path) -> None:
    assert load(folder, with_config=True).model.config.num_hidden_layers == 2


def picture(width: int, height: int) -> bytes:
    rows, columns = np.mgrid[0:height, 0:width]
    levels = np.stack([rows * 3 % 256, columns * 2 % 256, 255 - (rows + columns) % 256], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def processed(data: bytes) -> Tensor:
    """As diffusers: scaled on the shorter side, cropped in the middle."""
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    pixels: Tensor = processor(Image.open(io.BytesIO(data)), return_tensors="pt").pixel_values
    return pixels


def test_pixels_equal_transformers_of_a_picture_of_its_own_size(folder: Path) -> None:
    data = picture(56, 56)
    ours = load(folder, with_config=True).pixels(read_pixels(data))
    assert (ours - processed(data)).abs().max() <= 1e-5


def test_other_pictures_are_squeezed_not_cropped_as_wan_does(folder: Path) -> None:
    levels = torch.from_numpy(read_pixels(picture(96, 64))).permute(2, 0, 1)[None] / 127.5 - 1
    squeezed = torch.nn.functional.interpolate(levels, (56, 56), mode="bicubic", align_corners=False)
    mean, deviation = CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std
    expected = (squeezed * 0.5 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
    ours = load(folder, with_config=True).pixels(read_pixels(picture(96, 64)))
    assert (ours - expected).abs().max() <= 1e-5
    assert (ours - processed(picture(96, 64))).abs().max() > 0.1


def test_half_a_file_is_an_error_that_names_what_is_missing(folder: Path, tmp_path: Path) -> None:
    weights = load_file(save_original_clip(folder, tmp_path / "whole.safetensors"))
    del weights["visual.transformer.1.mlp.2.bias"]
    save_file(weights, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"visual\.transformer\.1\.mlp\.2\.bias"):
        load(tmp_path / "half.safetensors")


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    save_file({"textual.token_embedding.weight": torch.zeros(2, 2)}, tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="no CLIP image encoder"):
        load(tmp_path / "text.safetensors")
