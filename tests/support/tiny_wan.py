"""Wan2.1 models of a few thousand random weights, in the diffusers layout, made by diffusers itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

TEXT_WIDTH = 32
IMAGE_WIDTH, IMAGE_TOKENS = 160, 17
LATENT_CHANNELS = 16
_WORDS = ("a", "the", "red", "blue", "apple", "ball", "cat", "dog", "bouncing", "rolling", "jumping", "slowly")


def save_tiny_wan(folder: Path, seed: int = 0) -> Path:
    """Write a text-to-video model; two models of one seed are equal."""
    torch.manual_seed(seed)
    tiny_wan_dit().save_pretrained(folder / "transformer")
    tiny_wan_vae().save_pretrained(folder / "vae")
    vocabulary = _save_tokenizer(folder / "tokenizer")
    tiny_umt5(vocabulary).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


def save_tiny_wan_i2v(folder: Path, pictures: int | None = None) -> Path:
    """Write a model that is led through keyframes; with a number of them, one whose pictures have positions."""
    save_tiny_wan(folder)
    positions = None if pictures is None else pictures * IMAGE_TOKENS
    dit = tiny_wan_dit(
        in_channels=2 * LATENT_CHANNELS + 4,
        image_dim=IMAGE_WIDTH,
        added_kv_proj_dim=2 * 128,
        pos_embed_seq_len=positions,
    )
    dit.save_pretrained(folder / "transformer")
    tiny_clip_vision().save_pretrained(folder / "image_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    return folder


def tiny_wan_dit(**options: object) -> WanTransformer3DModel:
    """Two blocks of two heads, each as wide as the real one's: no shape of an original file tells the width."""
    dit = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=TEXT_WIDTH, ffn_dim=64, num_layers=2, **options
    )
    return _shaken(dit, 0.05)


def tiny_wan_vae() -> AutoencoderKLWan:
    """Four levels, of which two halve the frames, and 16 latent channels, like the real one."""
    return _shaken(AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS), 0.02)


def tiny_umt5(vocabulary: int) -> UMT5EncoderModel:
    """Two blocks of two heads, each with relative positions of its own."""
    config = UMT5Config(vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    return UMT5EncoderModel(config).eval()


def tiny_clip_vision() -> CLIPVisionModel:
    """Three blocks of two heads, each as wide as ViT-H's; 16 patches."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",
    )
    return _shaken(CLIPVisionModel(config), 0.05)


def _shaken(model: torch.nn.Module, deviation: float) -> torch.nn.Module:
    """The model with noise on all its weights, those that begin as zeros or ones too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def _save_tokenizer(folder: Path) -> int:
    """A unigram tokenizer of a few words and all letters, with UMT5's special tokens; returns its size."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in _WORDS), "▁", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - 0.01 * rank) for rank, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()
