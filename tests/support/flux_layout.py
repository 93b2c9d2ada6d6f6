"""FLUX.1's original layout, written by the tests from diffusers' tensors: independent of the maps under test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.ldm_layout import ldm_vae_tensors

_LAYERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
_DOUBLE_LAYERS = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}


def original_flux_tensors(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A transformer's tensors, by diffusers' names, in the layout of black-forest-labs/flux."""
    written: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for theirs, original in _LAYERS.items():
            if f"{theirs}.{kind}" in tensors:
                written[f"{original}.{kind}"] = tensors[f"{theirs}.{kind}"]
        scale, shift = tensors[f"norm_out.linear.{kind}"].chunk(2)
        written[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for block in range(_blocks(tensors, "transformer_blocks")):
            written |= _double_block(tensors, block, kind)
        for block in range(_blocks(tensors, "single_transformer_blocks")):
            written |= _single_block(tensors, block, kind)
    return {prefix + name: tensor for name, tensor in written.items()}


def _double_block(tensors: Mapping[str, Tensor], block: int, kind: str) -> dict[str, Tensor]:
    theirs, original = f"transformer_blocks.{block}.", f"double_blocks.{block}."
    written = {f"{original}{name}.{kind}": tensors[f"{theirs}{key}.{kind}"] for key, name in _DOUBLE_LAYERS.items()}
    for stream, keys in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        written[f"{original}{stream}_attn.qkv.{kind}"] = torch.cat([tensors[f"{theirs}attn.{k}.{kind}"] for k in keys])
    if kind == "weight":
        written |= {f"{original}{name}.scale": tensors[f"{theirs}{key}.weight"] for key, name in _DOUBLE_NORMS.items()}
    return written


def _single_block(tensors: Mapping[str, Tensor], block: int, kind: str) -> dict[str, Tensor]:
    theirs, original = f"single_transformer_blocks.{block}.", f"single_blocks.{block}."
    joined = [tensors[f"{theirs}{key}.{kind}"] for key in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    written = {
        f"{original}linear1.{kind}": torch.cat(joined),
        f"{original}linear2.{kind}": tensors[f"{theirs}proj_out.{kind}"],
        f"{original}modulation.lin.{kind}": tensors[f"{theirs}norm.linear.{kind}"],
    }
    if kind == "weight":
        written[f"{original}norm.query_norm.scale"] = tensors[f"{theirs}attn.norm_q.weight"]
        written[f"{original}norm.key_norm.scale"] = tensors[f"{theirs}attn.norm_k.weight"]
    return written


def _blocks(tensors: Mapping[str, Tensor], kind: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(rf"{kind}\.(\d+)\.", name))})


def save_all_in_one_file(folder: Path, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """One file as ComfyUI takes it, from a diffusers folder: transformer, both text encoders and VAE."""
    transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = original_flux_tensors(transformer, "model.diffusion_model.")
    clip = load_file(folder / "text_encoder" / "model.safetensors")
    for name, tensor in clip.items():
        tensors[f"text_encoders.clip_l.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = torch.eye(4)
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    for file in (folder / "text_encoder_2").glob("*.safetensors"):
        tensors |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in load_file(file).items()}
    tensors["text_encoders.t5xxl.logit_scale"] = torch.tensor(4.6)
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tensors |= original_vae_tensors(vae, levels=4, prefix="vae.")
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def original_vae_tensors(tensors: Mapping[str, Tensor], levels: int, prefix: str = "") -> dict[str, Tensor]:
    """A VAE's tensors as ae.safetensors has them."""
    written = ldm_vae_tensors(tensors, levels)
    return {prefix + name.removeprefix("first_stage_model."): tensor for name, tensor in written.items()}
