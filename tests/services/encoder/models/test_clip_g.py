"""Our CLIP-G against transformers' with the same random weights, from transformers' layout and from open_clip's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from services.encoder.models.clip_g import ClipGTextEncoder, load_clip_g
from services.modeling.weights import CheckpointError, open_checkpoint
from tests.support.ldm_layout import open_clip_tensors

LAYERS = 3
PREFIX = "conditioner.embedders.1.model."
CONFIG = {
    "vocab_size": 50,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 11,
    "hidden_act": "gelu",
    "projection_dim": 40,
    "eos_token_id": 2,
}
TOKEN_IDS = torch.tensor([[48, 5, 3, 49, 0, 0, 0, 0, 0, 0, 0], [48, 7, 0, 3, 4, 21, 30, 2, 1, 9, 49]])


@pytest.fixture(scope="module")
def reference() -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**CONFIG)).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms start as the identity and biases at zero: nothing would test them
        parameter.normal_(std=0.2)
    return model


def load(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> ClipGTextEncoder:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return load_clip_g(open_checkpoint(folder), config, device=torch.device("cpu"), dtype=torch.float32)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("layout", ["transformers", "transformers without a config", "open_clip"])
@pytest.mark.parametrize("clip_skip", range(1, LAYERS + 1))
def test_hidden_states_and_pooled_text_equal_transformers(
    tmp_path: Path, reference: CLIPTextModelWithProjection, layout: str, clip_skip: int
) -> None:
    state = reference.state_dict()
    state = open_clip_tensors(state, PREFIX) if layout == "open_clip" else state
    encoder = load(tmp_path, state, CONFIG if layout == "transformers" else None)
    expected = reference(TOKEN_IDS, output_hidden_states=True)
    states, pooled = encoder(TOKEN_IDS, clip_skip)
    assert relative_error(states, expected.hidden_states[-clip_skip]) <= 1e-5
    assert relative_error(pooled, expected.text_embeds) <= 1e-5


def test_both_layouts_give_the_same_bits(tmp_path: Path, reference: CLIPTextModelWithProjection) -> None:
    encoders = []
    for layout, state in (
        ("transformers", reference.state_dict()),
        ("open_clip", open_clip_tensors(reference.state_dict(), PREFIX)),
    ):
        (tmp_path / layout).mkdir()
        encoders.append(load(tmp_path / layout, state, None))
    (states, pooled), (other_states, other_pooled) = (encoder(TOKEN_IDS, 2) for encoder in encoders)
    assert torch.equal(states, other_states)
    assert torch.equal(pooled, other_pooled)


def test_the_rest_of_a_single_file_is_left_alone(tmp_path: Path, reference: CLIPTextModelWithProjection) -> None:
    others = {"conditioner.embedders.0.transformer.text_model.x": torch.zeros(1), "first_stage_model.x": torch.zeros(1)}
    encoder = load(tmp_path, open_clip_tensors(reference.state_dict(), PREFIX) | others, None)
    assert (encoder.positions, encoder.layers, encoder.vocabulary_size) == (11, LAYERS, 50)
    assert (encoder.width, encoder.projection_width) == (128, 40)


@pytest.mark.parametrize("clip_skip", [0, LAYERS + 1])
def test_a_layer_that_is_not_there_is_refused(
    tmp_path: Path, reference: CLIPTextModelWithProjection, clip_skip: int
) -> None:
    encoder = load(tmp_path, reference.state_dict(), CONFIG)
    with pytest.raises(ValueError, match="clip_skip must be from 1 to 3"):
        encoder(TOKEN_IDS, clip_skip)


def test_a_wrong_checkpoint_is_refused_by_name(tmp_path: Path, reference: CLIPTextModelWithProjection) -> None:
    state = open_clip_tensors(reference.state_dict(), PREFIX)
    with pytest.raises(CheckpointError, match=r"no whole CLIP-G text model: neither conditioner\.embedders\.1"):
        load(tmp_path, {"text_model.x": torch.zeros(1)}, None)
    with pytest.raises(CheckpointError, match=r"1 unexpected: conditioner\.embedders\.1\.model\.added"):
        load(tmp_path, {**state, f"{PREFIX}added": torch.zeros(1)}, None)
    in_proj = f"{PREFIX}transformer.resblocks.1.attn.in_proj_weight"
    with pytest.raises(CheckpointError, match=r"mis-shaped: .*resblocks\.1\.attn\.in_proj_weight"):
        load(tmp_path, {**state, in_proj: torch.zeros(7, 128)}, None)
    del state[in_proj]
    with pytest.raises(CheckpointError, match=r"1 missing: .*resblocks\.1\.attn\.in_proj_weight"):
        load(tmp_path, state, None)
