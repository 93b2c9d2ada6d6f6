"""An SDXL of a few random weights, in the diffusers layout, made by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support.tiny_sd15 import CLIP_TOKENIZER, tiny_vae, use_published_tokenizer_files

CLIP_L_WIDTH, CLIP_G_WIDTH, POOLED_WIDTH = 64, 128, 96
SCALING_FACTOR = 0.13025
# Heads are 64 wide and a size's features 256, as in every SDXL: a single file does not tell them.
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 3),
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": CLIP_L_WIDTH + CLIP_G_WIDTH,
    "norm_num_groups": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 256,
}


def save_tiny_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write the model; two models of one seed are equal."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=SCALING_FACTOR),
        text_encoder=CLIPTextModel(_clip_config(CLIP_L_WIDTH, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(CLIP_G_WIDTH, "gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(CLIP_TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(CLIP_TOKENIZER, pad_token="!"),
        unet=UNet2DConditionModel(**UNET),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="linspace",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    use_published_tokenizer_files(folder / "tokenizer")
    use_published_tokenizer_files(folder / "tokenizer_2", pad_token="!")
    return folder


def _clip_config(width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        vocab_size=49408,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=POOLED_WIDTH,
        bos_token_id=49406,
        eos_token_id=2,  # as published: transformers takes it to mean the highest id
    )
