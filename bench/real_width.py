"""Stable Diffusion 1.5 in its real sizes with random weights, in the diffusers layout: to time, not to look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_TOKENIZER = Path(__file__).resolve().parents[1] / "services" / "encoder" / "tokenizers" / "clip"


def save_real_width_sd15(folder: Path, dtype: torch.dtype) -> Path:
    """Write the model in a dtype; 860 M + 84 M + 123 M parameters."""
    torch.manual_seed(0)
    UNet2DConditionModel(**SD15_UNET).to(dtype).save_pretrained(folder / "unet")
    AutoencoderKL(**SD15_VAE).to(dtype).save_pretrained(folder / "vae")
    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
    CLIPTextModel(clip).to(dtype).save_pretrained(folder / "text_encoder")
    shutil.copytree(_TOKENIZER, folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder
