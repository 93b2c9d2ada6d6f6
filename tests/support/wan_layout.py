"""A Wan folder's weights as files in Wan's own layouts, one for each network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from services.decoder.models import wan_vae_keys
from services.decoder.models.wan_vae import load_wan_vae
from services.denoiser.models import wan_dit_keys
from services.denoiser.models.wan_dit import load_wan_dit
from services.encoder.models.t5 import LAYOUTS, load_t5
from services.modeling.components import read_json
from services.modeling.weights import open_checkpoint

BLOCKS_PER_LEVEL = 2  # of the VAE


def save_original_dit(folder: Path, names: Iterable[str], file: Path, prefix: str = "") -> Path:
    """A diffusers `transformer` folder as one file. names: the parameters of our network."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    listed = list(names)
    sources = zip(
        *(layout.sources(listed).values() for layout in (wan_dit_keys.DIFFUSERS, wan_dit_keys.ORIGINAL)), strict=True
    )
    pairs = [pair for published, original in sources for pair in zip(published, original, strict=True)]
    save_file({f"{prefix}{theirs}": weights[str(ours)] for ours, theirs in pairs}, file)
    return file


def save_original_vae(folder: Path, names: Iterable[str], file: Path, leave_out: str = "") -> Path:
    """A diffusers `vae` folder as one file, perhaps without a tensor. names: the parameters of our network."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    layouts = wan_vae_keys.DIFFUSERS, wan_vae_keys.ORIGINAL
    pairs = [[layout.source(name, BLOCKS_PER_LEVEL) for layout in layouts] for name in names]
    save_file({theirs: weights[ours] for ours, theirs in pairs if theirs != leave_out}, file)
    return file


def save_original_umt5(folder: Path, names: Iterable[str], file: Path) -> Path:
    """A transformers UMT5 folder as one file. names: the parameters of our network."""
    weights, original, published = load_file(folder / "model.safetensors"), LAYOUTS[-1], LAYOUTS[1]
    save_file({original.source(name): weights[published.source(name)] for name in names}, file)
    return file


def save_original_clip(folder: Path, file: Path, prefix: str = "visual.") -> Path:
    """A transformers `image_encoder` folder as one file, beside a bit of the text model that it was trained with."""
    theirs = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.items()}
    weights = {
        "cls_embedding": plain.pop("embeddings.class_embedding")[None, None],
        "pos_embedding": plain.pop("embeddings.position_embedding.weight")[None],
        "patch_embedding.weight": plain.pop("embeddings.patch_embedding.weight"),
        "head": torch.zeros(len(plain["post_layernorm.weight"]), 8),
    }
    for name in [name for name in plain if ".self_attn.q_proj." in name]:
        qkv = [plain.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[_original_clip_name(name.replace("self_attn.q_proj", "attn.to_qkv"))] = torch.cat(qkv)
    weights |= {_original_clip_name(name): tensor for name, tensor in plain.items()}
    whole = {f"{prefix}{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file({**whole, f"{prefix.replace('visual', 'textual')}token_embedding.weight": torch.zeros(2, 2)}, file)
    return file


_CLIP_NAMES = {
    "encoder.layers": "transformer",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
}


def _original_clip_name(name: str) -> str:
    for published, original in _CLIP_NAMES.items():
        name = name.replace(published, original)
    return name


def save_original_files(folder: Path, into: Path) -> tuple[Path, Path, Path]:
    """The transformer, the VAE and UMT5 of a diffusers folder, each as a file of its own."""

    def names(load: Callable[..., nn.Module], part: str) -> Iterable[str]:
        source, config = open_checkpoint(folder / part), read_json(folder / part / "config.json")
        return load(source, config, device=torch.device("cpu"), dtype=torch.float32).state_dict()

    umt5 = (name.removeprefix("stack.") for name in names(load_t5, "text_encoder"))
    return (
        save_original_dit(folder / "transformer", names(load_wan_dit, "transformer"), into / "dit.safetensors"),
        save_original_vae(folder / "vae", names(load_wan_vae, "vae"), into / "vae.safetensors"),
        save_original_umt5(folder / "text_encoder", umt5, into / "umt5.safetensors"),
    )
