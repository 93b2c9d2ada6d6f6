"""The original single-file layout, written by the tests from diffusers models: independent of the maps under test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_single_file(folder: Path, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """One file as the web UIs take it, from a diffusers folder of SD1.5 or SDXL, with what else lies about in them."""
    unet_config = json.loads((folder / "unet" / "config.json").read_text())
    vae_config = json.loads((folder / "vae" / "config.json").read_text())
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tensors = {ldm_unet_name(name, unet_config): tensor for name, tensor in unet.items()}
    tensors |= ldm_vae_tensors(vae, len(vae_config["block_out_channels"]))
    clip = load_file(folder / "text_encoder" / "model.safetensors")
    if (folder / "text_encoder_2").is_dir():
        clip_g = load_file(folder / "text_encoder_2" / "model.safetensors")
        tensors |= ldm_clip_tensors(clip, "conditioner.embedders.0.transformer.text_model.")
        tensors |= open_clip_tensors(clip_g, "conditioner.embedders.1.model.")
    else:
        tensors |= ldm_clip_tensors(clip)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["betas"] = torch.zeros(1000)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def ldm_clip_tensors(
    tensors: Mapping[str, Tensor], prefix: str = "cond_stage_model.transformer.text_model."
) -> dict[str, Tensor]:
    """A text encoder's tensors under their names in the single file, with its buffer of positions."""
    renamed = {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    positions = renamed[f"{prefix}embeddings.position_embedding.weight"].shape[0]
    return {**renamed, f"{prefix}embeddings.position_ids": torch.arange(positions)[None].float()}


def open_clip_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """CLIP-G's tensors as open_clip has them: q, k and v in one, the projection the other way round."""
    renamed = {_open_clip_name(name): tensor for name, tensor in tensors.items() if "_proj." not in name}
    renamed |= {_open_clip_name(name): tensor for name, tensor in tensors.items() if "out_proj" in name}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensor, *(tensors[name.replace("q_proj", f"{part}_proj")] for part in "kv")]
            place = _open_clip_name(name).partition(".self_attn")[0]
            renamed[f"{place}.attn.in_proj_{name.rpartition('.')[2]}"] = torch.cat(parts)
    renamed["text_projection"] = tensors["text_projection.weight"].T
    renamed["logit_scale"] = torch.tensor(4.6)
    del renamed["text_projection.weight"]
    return {prefix + name: tensor for name, tensor in renamed.items()}


def _open_clip_name(name: str) -> str:
    rules = (
        (r"^text_model\.", ""),
        (r"^embeddings\.token_embedding", "token_embedding"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^final_layer_norm", "ln_final"),
        (r"^encoder\.layers", "transformer.resblocks"),
        (r"\.layer_norm([12])", r".ln_\1"),
        (r"\.self_attn\.out_proj", ".attn.out_proj"),
        (r"\.mlp\.fc1", ".mlp.c_fc"),
        (r"\.mlp\.fc2", ".mlp.c_proj"),
    )
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def ldm_unet_name(name: str, config: Mapping[str, Any]) -> str:
    """A UNet's name in the original single file; written from the layout of CompVis' openaimodel.py."""
    per_level = config["layers_per_block"] + 1
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"^conv_in\.", lambda m: "input_blocks.0.0."),
        (r"^time_embedding\.linear_([12])", lambda m: f"time_embed.{2 * (int(m[1]) - 1)}"),
        (r"^add_embedding\.linear_([12])", lambda m: f"label_emb.0.{2 * (int(m[1]) - 1)}"),
        (r"^conv_norm_out", lambda m: "out.0"),
        (r"^conv_out", lambda m: "out.2"),
        (r"^mid_block\.resnets\.([01])", lambda m: f"middle_block.{2 * int(m[1])}"),
        (r"^mid_block\.attentions\.0", lambda m: "middle_block.1"),
        (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{int(m[1]) * per_level + int(m[2]) + 1}.0"),
        (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{int(m[1]) * per_level + int(m[2]) + 1}.1"),
        (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * per_level}.0.op"),
        (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{int(m[1]) * per_level + int(m[2])}.0"),
        (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{int(m[1]) * per_level + int(m[2])}.1"),
        (
            r"^up_blocks\.(\d)\.upsamplers\.0",
            lambda m: (
                f"output_blocks.{int(m[1]) * per_level + per_level - 1}."
                f"{2 if 'CrossAttn' in config['up_block_types'][int(m[1])] else 1}"
            ),
        ),
        (r"(put_blocks\.\d+\.0|middle_block\.\d)\.norm1", lambda m: f"{m[1]}.in_layers.0"),
        (r"(put_blocks\.\d+\.0|middle_block\.\d)\.norm2", lambda m: f"{m[1]}.out_layers.0"),
        (r"\.conv1\.", lambda m: ".in_layers.2."),
        (r"\.conv2\.", lambda m: ".out_layers.3."),
        (r"\.time_emb_proj", lambda m: ".emb_layers.1"),
        (r"\.conv_shortcut", lambda m: ".skip_connection"),
    ]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return f"model.diffusion_model.{name}"


def ldm_vae_tensors(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A VAE's tensors with the names and shapes of the original single file."""
    rules = (
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    )
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        is_attention = ".attn_1." in name and tensor.ndim == 2
        renamed[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_attention else tensor
    return renamed
