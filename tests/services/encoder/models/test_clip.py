"""Our CLIP text encoder against transformers' with the same random weights, from every layout of checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from services.encoder.models.clip import ClipTextEncoder, load_clip
from services.modeling.weights import CheckpointError, open_checkpoint

LAYERS = 3
CONFIG = {
    "vocab_size": 50,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 11,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49,
}
PREFIXES = {
    "all in one file": "text_encoders.clip_l.transformer.text_model.",
    "transformers 5": "",
    "transformers 4": "text_model.",
    "single file": "cond_stage_model.transformer.text_model.",
    "single file by transformers 5": "cond_stage_model.transformer.",
}
TOKEN_IDS = torch.tensor([[48, 5, 3, 49, 49, 49, 49, 49, 49, 49, 49], [48, 7, 0, 3, 4, 21, 30, 2, 1, 9, 49]])


@pytest.fixture(scope="module")
def reference() -> CLIPTextModel:
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(**CONFIG)).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms start as the identity and biases at zero: nothing would test them
        parameter.normal_(std=0.2)
    return model


def tensors(reference: CLIPTextModel, prefix: str) -> dict[str, Tensor]:
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in reference.state_dict().items()}


def load(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> ClipTextEncoder:
    save_file(dict(state), folder / "model.safetensors")
    return load_clip(open_checkpoint(folder), config, device=torch.device("cpu"), dtype=torch.float32)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("config", [CONFIG, None], ids=["with a config", "by its shapes"])
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_the_last_layer_equals_transformers(
    tmp_path: Path, reference: CLIPTextModel, prefix: str, config: dict[str, Any] | None
) -> None:
    encoder = load(tmp_path, tensors(reference, prefix), config)
    assert relative_error(encoder(TOKEN_IDS), reference(TOKEN_IDS).last_hidden_state) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("clip_skip", range(1, LAYERS + 1))
def test_clip_skip_equals_a_model_without_the_skipped_layers(
    tmp_path: Path, reference: CLIPTextModel, clip_skip: int
) -> None:
    kept = LAYERS + 1 - clip_skip
    shorter = CLIPTextModel(CLIPTextConfig(**{**CONFIG, "num_hidden_layers": kept})).eval()
    shorter.load_state_dict({name: reference.state_dict()[name] for name in shorter.state_dict()})
    encoder = load(tmp_path, tensors(reference, "text_model."), CONFIG)
    assert relative_error(encoder(TOKEN_IDS, clip_skip), shorter(TOKEN_IDS).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("config", [CONFIG, None], ids=["with a config", "by its shapes"])
def test_the_pooled_embedding_is_the_last_state_at_the_first_end_of_text(
    tmp_path: Path, reference: CLIPTextModel, config: dict[str, Any] | None
) -> None:
    encoder = load(tmp_path, tensors(reference, "text_model."), config)
    output = reference(TOKEN_IDS)
    assert relative_error(encoder.pooled(TOKEN_IDS), output.pooler_output) <= 1e-5
    assert relative_error(encoder.pooled(TOKEN_IDS)[0], output.last_hidden_state[0, 3]) <= 1e-5


def test_a_prompt_does_not_depend_on_its_batch(tmp_path: Path, reference: CLIPTextModel) -> None:
    encoder = load(tmp_path, tensors(reference, ""), CONFIG)
    torch.testing.assert_close(encoder(TOKEN_IDS)[:1], encoder(TOKEN_IDS[:1]))


def test_the_position_ids_of_old_files_are_ignored(tmp_path: Path, reference: CLIPTextModel) -> None:
    prefix = "cond_stage_model.transformer.text_model."
    state = {
        **tensors(reference, prefix),
        f"{prefix}embeddings.position_ids": torch.arange(11)[None],
        "cond_stage_model.logit_scale": torch.zeros(1),
        "first_stage_model.quant_conv.bias": torch.zeros(8),
    }
    assert load(tmp_path, state, None).positions == 11


def test_the_sizes_of_clip_l_are_read_from_its_shapes(tmp_path: Path) -> None:
    prefix = "cond_stage_model.transformer.text_model."
    real = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=1, vocab_size=60
    )
    encoder = load(tmp_path, tensors(CLIPTextModel(real), prefix), None)
    config = encoder.model.config
    assert (config.num_attention_heads, config.intermediate_size, config.hidden_act) == (12, 3072, "quick_gelu")
    assert (encoder.positions, encoder.layers, encoder.vocabulary_size) == (77, 1, 60)


@pytest.mark.parametrize("clip_skip", [0, -1, LAYERS + 1])
def test_a_layer_that_is_not_there_is_refused(tmp_path: Path, reference: CLIPTextModel, clip_skip: int) -> None:
    encoder = load(tmp_path, tensors(reference, ""), CONFIG)
    with pytest.raises(ValueError, match="clip_skip must be from 1 to 3"):
        encoder(TOKEN_IDS, clip_skip)


def test_a_wrong_checkpoint_is_refused_by_name(tmp_path: Path, reference: CLIPTextModel) -> None:
    state = tensors(reference, "text_model.")
    with pytest.raises(CheckpointError, match="no CLIP text model"):
        load(tmp_path, {"cond_stage_model.model.positional_embedding": torch.zeros(1)}, None)
    with pytest.raises(CheckpointError, match=r"text_model\.added"):
        load(tmp_path, {**state, "text_model.added": torch.zeros(1)}, CONFIG)
    del state["text_model.final_layer_norm.bias"]
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias"):
        load(tmp_path, state, CONFIG)
