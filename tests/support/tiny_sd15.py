"""A Stable Diffusion 1.5 of a few thousand random weights, in the diffusers layout, made by diffusers itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLIP_TOKENIZER = Path(__file__).resolve().parents[2] / "services" / "encoder" / "tokenizers" / "clip"
WIDTH = 64


def save_tiny_sd15(folder: Path, seed: int = 0) -> Path:
    """Write the model; two models of one seed are equal."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=_tiny_clip(),
        tokenizer=CLIPTokenizer.from_pretrained(CLIP_TOKENIZER),
        unet=_tiny_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="linspace",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    use_published_tokenizer_files(folder / "tokenizer")
    return folder


def _tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def tiny_vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    """A VAE of Stable Diffusion's shape, with a scaling factor for its latents."""
    return AutoencoderKL(
        scaling_factor=scaling_factor,
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=128,
    )


def _tiny_clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=1,
            vocab_size=49408,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def use_published_tokenizer_files(folder: Path, **special_tokens: str) -> None:
    """The file set of the published checkpoints (vocab.json, merges.txt), whatever this transformers writes."""
    shutil.rmtree(folder)
    shutil.copytree(CLIP_TOKENIZER, folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | special_tokens
        (folder / name).write_text(json.dumps(content))
