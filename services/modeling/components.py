"""From a manifest entry to one component's checkpoint: the folder or file it is in, its config, device and dtype."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safelight.errors import CheckpointError
from services.common.manifest import FLOAT8, ModelEntry, Part
from services.modeling.product_speed import bfloat16_is_fast
from services.modeling.weights import Checkpoint, open_checkpoint

_log = logging.getLogger("safelight.components")

_PIPELINE_FAMILIES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux",
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
}
# Keys of which a single file of the family has one, and those below it lack all.
_FAMILY_KEYS = {
    "sdxl": ("model.diffusion_model.label_emb.0.0.weight",),
    "sd15": ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",),
    "flux": (
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale",
        "single_transformer_blocks.0.attn.norm_k.weight",
    ),
    "wan": (
        "blocks.0.cross_attn.norm_k.weight",
        "model.diffusion_model.blocks.0.cross_attn.norm_k.weight",
        "blocks.0.attn2.norm_k.weight",
    ),
}
_OTHER_FAMILY_KEYS = {
    "SDXL's refiner": "conditioner.embedders.0.model.ln_final.weight",
    "Stable Diffusion 2": "cond_stage_model.model.ln_final.weight",
}


@dataclass(frozen=True)
class Source:
    """Where one component's weights come from; `config` is its config.json, None for a single file."""

    checkpoint: Checkpoint
    config: Mapping[str, Any] | None


def open_component(entry: ModelEntry, part: Part, folder: str) -> Source:
    """The checkpoint of one network.

    Args:
        entry: the model.
        part: the network; its own path goes before the model's.
        folder: the network's folder in the diffusers layout, e.g. "unet".

    Raises:
        CheckpointError: the path does not exist, or holds no weights of a known layout.
    """
    paths = [_existing(entry, path) for path in part.paths or entry.paths]
    if len(paths) > 1:
        return Source(open_checkpoint(paths, allow_pickle=part.allow_pickle), None)
    path = paths[0]
    if path.is_dir() and not part.path:
        path = _existing(entry, path / folder)
    checkpoint = open_checkpoint(path, allow_pickle=part.allow_pickle)
    return Source(checkpoint, read_json(path / "config.json") if path.is_dir() else None)


def _existing(entry: ModelEntry, path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(
            f"model {entry.name!r}: {path} does not exist: correct the path in the manifest", file=str(path)
        )
    return path


def detect_family(entry: ModelEntry) -> str:
    """The family of a model: named in the manifest, by model_index.json, or told by the keys of its single file.

    Raises:
        CheckpointError: the model is of no family that this release serves.
    """
    if entry.family:
        return entry.family
    path, *others = (_existing(entry, path) for path in entry.paths)
    if path.is_dir():
        pipeline = (read_json(path / "model_index.json") or {}).get("_class_name", "")
        family = _PIPELINE_FAMILIES.get(pipeline)
        what = f"pipeline {pipeline!r}" if pipeline else "a folder without model_index.json"
    else:
        family, what = _family_of_keys(open_checkpoint([path, *others]))
    if family is None:
        raise CheckpointError(
            f"model {entry.name!r}: {path} is {what}; this release serves {', '.join(_FAMILY_KEYS)}", file=str(path)
        )
    return family


def _family_of_keys(checkpoint: Checkpoint) -> tuple[str | None, str]:
    for other, key in _OTHER_FAMILY_KEYS.items():
        if key in checkpoint:
            return None, other
    for family, keys in _FAMILY_KEYS.items():
        if any(key in checkpoint for key in keys):
            return family, family
    return None, "of no known family (name one with 'family:' in the manifest)"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): fetch it again", file=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object", file=str(path))
    return content


def resolve_device(name: str) -> torch.device:
    """The device of a setting; "auto" takes the first GPU when there is one.

    Raises:
        CheckpointError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"device {name!r} is not on this machine: {error}") from error


def resolve_dtype(name: str, device: torch.device, half: torch.dtype = torch.float16) -> torch.dtype:
    """What a manifest entry computes in; "auto" is float32 on a CPU and, elsewhere, the half precision of the family.

    float8_e4m3fn, a form of storage, computes in bfloat16. bfloat16 is float32, and logged as such, on a CPU that is
    slower with it: more memory and less time.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else half
    if name == FLOAT8:
        name = "bfloat16"
    if name == "bfloat16" and device.type == "cpu" and not bfloat16_is_fast():
        _log.warning("this CPU computes float32 faster than bfloat16: float32 it is, which takes more memory")
        return torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def configure_torch(device: str, threads: int) -> torch.device:
    """The device that the settings name; bounds the threads of a CPU computation (0: torch's choice).

    Raises:
        CheckpointError: no such device on this machine.
    """
    if threads:
        torch.set_num_threads(threads)
    return resolve_device(device)
