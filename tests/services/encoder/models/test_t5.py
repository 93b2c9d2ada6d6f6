"""Our T5 encoder against transformers' with the same random weights, from every layout of checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5EncoderModel

from services.encoder.models.t5 import T5TextEncoder, load_t5
from services.modeling.weights import CheckpointError, open_checkpoint
from tests.support.gguf_layout import save_gguf
from tests.support.scaled_layout import scaled, unscaled
from tests.support.tiny_flux import tiny_t5

TOKEN_IDS = torch.tensor([[3, 9, 7, 120, 31000, 1, *[0] * 200], [5, 1, *[0] * 204]])
PREFIX = "text_encoders.t5xxl.transformer."


@pytest.fixture(scope="module")
def reference() -> T5EncoderModel:
    torch.manual_seed(0)
    model = tiny_t5().requires_grad_(False)
    for parameter in model.parameters():  # norms start as the identity: nothing would test them
        parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def weights(reference: T5EncoderModel) -> dict[str, Tensor]:
    """By transformers' names, the embedding once, as in published files."""
    return {name: tensor for name, tensor in reference.state_dict().items() if name != "encoder.embed_tokens.weight"}


def load(path: Path, config: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> T5TextEncoder:
    return load_t5(open_checkpoint(path), config, device=torch.device("cpu"), dtype=dtype)


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def llama_cpp_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under llama.cpp's names, by the `gguf` package's own map."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    return {str(names.get_name(name, try_suffixes=(".weight",))): tensor for name, tensor in weights.items()}


@torch.inference_mode()
@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("layout", ["file", "file with both embeddings", "file of a stack", "all in one", "llama.cpp"])
def test_equals_transformers(
    tmp_path: Path, reference: T5EncoderModel, weights: dict[str, Tensor], layout: str, with_config: bool
) -> None:
    embedding = weights["shared.weight"]
    without = {name: tensor for name, tensor in weights.items() if name != "shared.weight"}
    tensors = {
        "file": weights,
        "file with both embeddings": {**weights, "encoder.embed_tokens.weight": embedding},
        "file of a stack": {**without, "encoder.embed_tokens.weight": embedding},
        "all in one": {PREFIX + name: tensor for name, tensor in weights.items()} | {"vae.x": torch.zeros(1)},
        "llama.cpp": llama_cpp_tensors(weights),
    }[layout]
    config = reference.config.to_dict() if with_config else None
    encoder = load(saved(tmp_path / "t5.safetensors", tensors), config)
    assert relative_error(encoder(TOKEN_IDS), reference(TOKEN_IDS).last_hidden_state) <= 1e-5


def test_shards_and_their_config_are_read(tmp_path: Path, reference: T5EncoderModel) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="3MB")
    encoder = load(tmp_path, reference.config.to_dict())
    assert relative_error(encoder(TOKEN_IDS), reference(TOKEN_IDS).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q5_0"])
def test_a_gguf_file_is_dequantized_on_load(tmp_path: Path, weights: dict[str, Tensor], quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization]
    read = save_gguf(tmp_path / "t5.gguf", llama_cpp_tensors(weights), kind)
    plain = saved(tmp_path / "t5.safetensors", read)
    assert torch.equal(load(tmp_path / "t5.gguf")(TOKEN_IDS), load(plain)(TOKEN_IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_in_few_bits_are_cast_on_load(tmp_path: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in weights.items()}
    few, full = (
        load(saved(tmp_path / "few.safetensors", rounded)),
        load(saved(tmp_path / "full.safetensors", {name: tensor.float() for name, tensor in rounded.items()})),
    )
    assert torch.equal(few(TOKEN_IDS), full(TOKEN_IDS))


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_scaled_file_is_the_products_with_its_scales(tmp_path: Path, weights: dict[str, Tensor], prefix: str) -> None:
    stored = scaled(weights, prefix)
    scales, plain = saved(tmp_path / "scaled.safetensors", stored), saved(tmp_path / "t5.safetensors", unscaled(stored))
    assert torch.equal(load(scales)(TOKEN_IDS), load(plain)(TOKEN_IDS))


def test_in_float16_the_last_product_of_a_block_is_float32(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    encoder = load(saved(tmp_path / "t5.safetensors", weights), dtype=torch.float16)
    dtypes = {name.rsplit(".")[-2]: parameter.dtype for name, parameter in encoder.named_parameters()}
    assert dtypes["wo"] == torch.float32
    assert dtypes["wi_0"] == dtypes["o"] == dtypes["embed_tokens"] == torch.float16
    assert relative_error(encoder(TOKEN_IDS).float(), load(tmp_path / "t5.safetensors")(TOKEN_IDS)) < 0.01


def test_the_embedding_is_in_memory_once(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    encoder = load(saved(tmp_path / "t5.safetensors", weights))
    assert sum(tuple(p.shape) == tuple(weights["shared.weight"].shape) for p in encoder.state_dict().values()) == 1


def test_the_sizes_of_t5_xxl_are_read_from_its_shapes(tmp_path: Path) -> None:
    shapes = {
        "shared.weight": (32128, 4),
        "encoder.final_layer_norm.weight": (4,),
        "encoder.block.0.layer.0.layer_norm.weight": (4,),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (10240, 4),
    }
    file = saved(tmp_path / "t5.safetensors", {name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match="missing") as error:
        load(file)
    assert "mis-shaped" not in str(error.value)


def test_a_wrong_checkpoint_is_refused_by_name(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="holds no T5 encoder"):
        load(saved(tmp_path / "t5.safetensors", {"text_model.x": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected: encoder\.added"):
        load(saved(tmp_path / "t5.safetensors", {**weights, "encoder.added": torch.zeros(1)}))
    half = {name: tensor for name, tensor in weights.items() if "wi_0" not in name}
    with pytest.raises(CheckpointError, match=r"lacks .*wi_0"):
        load(saved(tmp_path / "t5.safetensors", half))
