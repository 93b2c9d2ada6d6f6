"""A FLUX.1 of a few thousand random weights, in the diffusers layout, made by diffusers itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

_TOKENIZERS = Path(__file__).resolve().parents[2] / "services" / "encoder" / "tokenizers"
CLIP_TOKENIZER, T5_TOKENIZER = _TOKENIZERS / "clip", _TOKENIZERS / "t5"
POOLED_WIDTH, CONTEXT_WIDTH = 64, 32
LATENT_CHANNELS = 16


def save_tiny_flux(folder: Path, seed: int = 0, *, schnell: bool = False) -> Path:
    """Write the model: dev, or schnell, which takes no guidance scale and has no dynamic shift. T5 is in two shards."""
    torch.manual_seed(seed)
    pipeline = FluxPipeline(
        scheduler=_scheduler(schnell),
        vae=tiny_flux_vae(),
        text_encoder=_tiny_clip(),
        tokenizer=CLIPTokenizer.from_pretrained(CLIP_TOKENIZER),
        text_encoder_2=tiny_t5(),
        tokenizer_2=T5TokenizerFast(tokenizer_file=str(T5_TOKENIZER / "tokenizer.json"), model_max_length=512),
        transformer=tiny_flux_dit(distilled_guidance=not schnell),
    )
    pipeline.save_pretrained(folder)
    pipeline.text_encoder_2.save_pretrained(folder / "text_encoder_2", max_shard_size="3MB")
    (folder / "text_encoder_2" / "model.safetensors").unlink(missing_ok=True)
    for name, published in (("tokenizer", CLIP_TOKENIZER), ("tokenizer_2", T5_TOKENIZER)):
        shutil.rmtree(folder / name)
        shutil.copytree(published, folder / name)
    return folder


def _scheduler(schnell: bool) -> FlowMatchEulerDiscreteScheduler:
    if schnell:
        return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def tiny_flux_dit(*, distilled_guidance: bool = True) -> FluxTransformer2DModel:
    """Two double and two single blocks of two heads; every weight is random, the norms' and biases too."""
    dit = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=distilled_guidance,
        axes_dims_rope=(4, 14, 14),
    )
    for name, parameter in dit.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("attn.norm" in name), std=0.1)
    return dit.eval().requires_grad_(False)


def tiny_flux_vae() -> AutoencoderKL:
    """Four levels, 16 latent channels, no quant convolutions."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=128,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _tiny_clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=POOLED_WIDTH,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=1,
            vocab_size=49408,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )


def tiny_t5() -> T5EncoderModel:
    """T5 v1.1's encoder: two layers, gated GELU."""
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=CONTEXT_WIDTH,
            d_kv=64,
            d_ff=64,
            num_layers=2,
            num_heads=1,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).eval()
